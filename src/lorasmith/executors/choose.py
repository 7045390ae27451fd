"""The executor that a command asks for: this process, or a Ray cluster."""

from __future__ import annotations

from lorasmith.executors.base import Executor, Local
from lorasmith.executors.ray import Cluster
from lorasmith.options import ClusterOptions


def make_executor(options: ClusterOptions) -> Executor:
    """The executor that is asked for."""
    if options.executor == "local":
        return Local()
    return Cluster(options.ray_address, options.workers, options.worker_threads, options.worker_gpus)
