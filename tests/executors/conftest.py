"""A cluster of two nodes on this machine, of one processor each, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="package")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    store = 80 << 20
    head = {"num_cpus": 1, "object_store_memory": store, "include_dashboard": False}
    nodes = None
    for last in (False, False, True):  # Ray gives a node 30 s to come up, which a busy machine may exceed
        try:
            nodes = Nodes(initialize_head=True, head_node_args=head)
            break
        except Exception:
            if last:
                raise
    assert nodes is not None
    nodes.add_node(num_cpus=1, object_store_memory=store)
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
