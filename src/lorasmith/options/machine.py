"""Where the work is done."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lorasmith.errors import UsageError
from lorasmith.options.base import Flag, Options
from lorasmith.options.values import Count


class SeedOptions(Options):
    """The one source of chance."""

    PANEL: ClassVar[str] = "Scoring"

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of everything random."""


class DeviceOptions(Options):
    """What a model runs on."""

    PANEL: ClassVar[str] = "Speed and memory"

    device: str = "auto"
    """Device that computes: auto, cpu, cuda, cuda:1 or mps."""


class SpreadOptions(DeviceOptions):
    """What a model runs on that may be larger than one device."""

    device_map: Annotated[Literal["auto"] | None, Flag(default="one device")] = None
    """auto spreads a model that is too large for one GPU over all GPUs, memory and disk."""


class ClusterOptions(Options):
    """Whether the work is done in this process or by the workers of a cluster; results are the same."""

    PANEL: ClassVar[str] = "Cluster"

    executor: Literal["local", "ray"] = "local"
    """Where models run and shards are merged: here, or on a Ray cluster."""
    ray_address: Annotated[str | None, Flag(default="one is started here")] = None
    """Address of the Ray cluster: auto, or ray://host:10001."""
    workers: Annotated[Count | None, Flag(default="as many as the cluster has room for")] = None
    """Number of workers on the cluster."""
    worker_threads: Annotated[Count | None, Flag(default="those of this process")] = None
    """Threads of each worker on the cluster."""
    worker_gpus: Annotated[Annotated[float, Field(ge=0)] | None, Flag(default="1 where a GPU computes")] = (
        None
    )
    """GPUs of each worker on the cluster; a fraction shares one."""

    @model_validator(mode="after")
    def _belong_to_a_cluster(self) -> Self:
        names = ("ray_address", "workers", "worker_threads", "worker_gpus")
        given = [name for name in names if getattr(self, name) is not None]
        if self.executor == "local" and given:
            raise UsageError(f"--{given[0].replace('_', '-')} without a cluster", expected="--executor ray")
        gpus = self.worker_gpus
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise UsageError(f"--worker-gpus is {gpus:g}", expected="a part of one GPU, or whole ones")
        return self
