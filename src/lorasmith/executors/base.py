"""What an executor is: chunks of work in, results out, wherever they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

from lorasmith.executors.chunks import Work
from lorasmith.executors.local import work_through
from lorasmith.executors.log import ChunkLog
from lorasmith.files.journal import Journal, Rows
from lorasmith.options import ClusterOptions

R = TypeVar("R")


@dataclass(frozen=True)
class Recipe:
    """How a worker makes the work itself: a context manager by its place, and arguments that can be sent."""

    function: str
    """`package.module:function`."""
    arguments: Mapping[str, Any]
    gpu: bool = False
    """Whether the work computes on a GPU; a worker then gets one unless told otherwise."""
    parcel: Callable[[Rows], Any] | None = None
    """What a chunk needs besides its rows: made here, sent with it, given to the work's `take` before it
    runs. Without it a worker reads what it needs from storage."""


class Executor(AbstractContextManager["Executor"], Protocol):
    """Computes chunks. Inside a `with` block its workers stay for the next piece of work."""

    elsewhere: bool
    """Whether the work is made anew from its recipe, in other processes."""

    def work_through(
        self,
        chunks: Iterable[Rows],
        work: Work[R],
        journal: Journal | None,
        recipe: Recipe,
        log: ChunkLog | None = None,
    ) -> Iterator[tuple[Rows, R]]:
        """Each chunk with its result, in any order; `log` hears what each was computed under."""

    def places(self, recipe: Recipe) -> int:
        """How many chunks can be under way at once."""


class Local:
    """This process."""

    elsewhere = False

    def work_through(
        self,
        chunks: Iterable[Rows],
        work: Work[R],
        journal: Journal | None,
        recipe: Recipe,
        log: ChunkLog | None = None,
    ) -> Iterator[tuple[Rows, R]]:
        """Each chunk with its result, in the order of the chunks."""
        return work_through(chunks, work, journal, log)

    def places(self, recipe: Recipe) -> int:
        """One."""
        return 1

    def __enter__(self) -> Local:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""


def make_executor(options: ClusterOptions) -> Executor:
    """The executor that is asked for."""
    if options.executor == "local":
        return Local()
    from lorasmith.executors.ray import Cluster

    return Cluster(options.ray_address, options.workers, options.worker_threads, options.worker_gpus)
