"""Work through chunks on a Ray cluster: each worker holds the model, a lost one costs the chunk in its hands.

The chunks are those of `executors.local`, so are their results: a worker packs what this process would have
computed, with the same arithmetic, threads and batches. Models lie on storage that all machines see; rows and
packed results travel, at most one chunk's for each worker at a time.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from lorasmith.errors import MachineError, RemoteError
from lorasmith.executors.base import Recipe
from lorasmith.executors.chunks import Waiting, Work
from lorasmith.executors.crew import Crew
from lorasmith.executors.local import kept
from lorasmith.executors.log import ChunkLog
from lorasmith.files.journal import Journal, Rows

R = TypeVar("R")

_OBJECT_STORE = 200_000_000
"""Bytes of a cluster that is started here; results beyond it go to disk, and are taken out at once."""


@dataclass
class Cluster:
    """An executor on Ray, local or at an address. Inside a `with` block its workers stay."""

    address: str | None = None
    """`auto`, `ray://host:10001`, `host:6379`; None starts one on this machine."""
    workers: int | None = None
    """By default as many as the cluster has room for. A larger number lets a cluster grow that can."""
    threads: int | None = None
    """Of each worker; by default those of this process. Equal threads give equal bytes."""
    gpus: float | None = None
    """Of each worker; by default one where the work computes on a GPU."""
    start_seconds: float = 600.0
    """How long the first worker may take to come, as where a cluster grows on demand."""
    elsewhere: bool = True
    _crew: Crew | None = field(default=None, repr=False)
    _blocks: int = 0
    _losses: int = 0

    @property
    def losses(self) -> int:
        """Workers lost so far."""
        return self._losses + (self._crew.losses if self._crew else 0)

    def __enter__(self) -> Cluster:
        self._blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blocks -= 1
        if self._crew is not None and (error is not None or not self._blocks):
            self._dismiss(self._crew)

    def work_through(
        self,
        chunks: Iterable[Rows],
        work: Work[R],
        journal: Journal | None,
        recipe: Recipe,
        log: ChunkLog | None = None,
    ) -> Iterator[tuple[Rows, R]]:
        """Each chunk with its result, as they come; a split chunk comes as its parts.

        What the journal holds comes first. Raises `MemoryLimitError` when the smallest part does not fit,
        `RemoteError` when a chunk brings down one worker after the other or no worker comes, and whatever
        the work raises.
        """
        log = ChunkLog() if log is None else log
        waiting = Waiting(chunks, work, journal)
        yield from kept(journal, work, log)
        if not waiting:
            return
        wanted = max(1, min(self.places(recipe), len(waiting)))
        crew, alone = self._crew_for(recipe), not self._blocks
        try:
            for rows, packed, conditions in crew.results(waiting, recipe, wanted):
                if journal:
                    journal.add(rows, packed, waiting.limit, conditions.model_dump())
                log.note(rows, conditions)
                yield rows, work.unpack(rows, packed)
        except BaseException:
            alone = True  # what they still compute is of no use
            raise
        finally:
            if alone:
                self._dismiss(crew)

    def places(self, recipe: Recipe) -> int:
        """The number asked for, else of how many workers the cluster's machines have room for now."""
        join(self.address)
        if self.workers is not None:
            return self.workers
        import ray

        threads, gpus = self._threads(), self._gpus(recipe)
        room = 0
        for node in ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                fits = int(has.get("CPU", 0) // threads)
                room += min(fits, int(has.get("GPU", 0) / gpus)) if gpus else fits
        return max(1, room)

    def _crew_for(self, recipe: Recipe) -> Crew:
        gpus = self._gpus(recipe)
        if self._crew is not None and self._crew.gpus != gpus:
            self._dismiss(self._crew)
        if self._crew is None:
            self._crew = Crew(self._threads(), gpus, self.start_seconds)
        return self._crew

    def _dismiss(self, crew: Crew) -> None:
        """Send workers away. Work that was broken off may come late to it, when others have taken over."""
        crew.dismiss()
        if self._crew is crew:
            self._losses += crew.losses
            self._crew = None

    def _threads(self) -> int:
        if self.threads is not None:
            return self.threads
        import torch

        return torch.get_num_threads()

    def _gpus(self, recipe: Recipe) -> float:
        return self.gpus if self.gpus is not None else float(recipe.gpu)


def join(address: str | None) -> None:
    """Join the cluster, once in a process; raises `MachineError` without ray, `RemoteError` without it."""
    try:
        import ray
    except ImportError as error:
        raise MachineError("ray is not installed here", remedy="pip install 'lorasmith[cluster]'") from error
    if ray.is_initialized():
        return
    ended = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:  # "local": Ray would else join any cluster that runs on this machine
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # of no class of its own where a node does not come up in time
        with suppress(Exception):
            ray.shutdown()
        raise RemoteError(
            f"cannot join the Ray cluster: {error}",
            where=address,
            remedy="check --ray-address, and that `ray status` shows the cluster from here",
        ) from error
    # Ray puts a handler of its own in place, which would end a command with another exit code.
    if callable(ended) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ended)
