"""Nodes of the tests' cluster: small, and given more than one chance to come up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

N = TypeVar("N")

STORE = 80 << 20
"""Bytes of a node's object store."""


def patiently(make: Callable[[], N]) -> N:
    """Ray gives a node 30 s to come up, which a busy machine may exceed: it is tried three times."""
    for _ in range(2):
        try:
            return make()
        except Exception:  # of no class of its own
            continue
    return make()


def add_node(cluster: Any, **more: Any) -> Any:
    """Another node of one processor."""
    return patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=STORE, **more))
