"""A cluster of two nodes on this machine, of one processor each, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.executors.nodes import STORE, add_node, patiently


@pytest.fixture(scope="package")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    nodes = patiently(lambda: Nodes(initialize_head=True, head_node_args=head))
    add_node(nodes)
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{root}:{root / 'src'}"}
    ray.init(
        address=nodes.address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )
    yield nodes
    ray.shutdown()
    nodes.shutdown()
