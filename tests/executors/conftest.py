"""A cluster of two nodes on this machine, of one processor each, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.executors.ray import Cluster
from tests.executors.nodes import STORE, add_node, patiently


@pytest.fixture(scope="package")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    # Without the processes that scale a cluster and read logs, which nothing here needs.
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    head |= {"no_monitor": True, "include_log_monitor": False}
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


@pytest.fixture(scope="module")
def workers(cluster: Any) -> Iterator[Cluster]:
    """An executor whose workers stay from test to test: to start one takes three to eight seconds of a
    processor, by whether it needs torch. They hold both nodes, so that no other executor gets a worker."""
    with Cluster(threads=1) as executor:
        yield executor
