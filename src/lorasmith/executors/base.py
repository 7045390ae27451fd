"""What an executor is: chunks of work in, results out, wherever they are computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lorasmith.errors import UsageError
from lorasmith.executors.local import Work, work_through
from lorasmith.files.journal import Journal, Rows

R = TypeVar("R")


@dataclass(frozen=True)
class Recipe:
    """How a worker makes the work itself: a context manager by its place, and arguments that can be sent."""

    function: str
    """`package.module:function`."""
    arguments: Mapping[str, Any]


class Executor(Protocol):
    """Computes chunks; `lorasmith.executors.local.work_through` says what comes out."""

    def work_through(
        self, chunks: Iterable[Rows], work: Work[R], journal: Journal | None, recipe: Recipe
    ) -> Iterator[tuple[Rows, R]]:
        """Each chunk with its result, in any order; `recipe` makes `work` elsewhere."""

    def hardware(self) -> list[str]:
        """What computed the results so far, one entry for each kind of worker; one is no mixture."""


class Local:
    """This process."""

    def work_through(
        self, chunks: Iterable[Rows], work: Work[R], journal: Journal | None, recipe: Recipe
    ) -> Iterator[tuple[Rows, R]]:
        """Each chunk with its result, in the order of the chunks."""
        return work_through(chunks, work, journal)

    def hardware(self) -> list[str]:
        """This machine: never a mixture."""
        return []


def make_executor(name: str, *, address: str | None = None, workers: int | None = None) -> Executor:
    """The executor of this name; raises `UsageError` for another name, and for options that are not its."""
    if name == "ray":
        from lorasmith.executors.ray import Cluster

        return Cluster(address, workers)
    if name != "local":
        raise UsageError(f"there is no executor {name!r}", expected="local or ray")
    if address is not None or workers is not None:
        raise UsageError("a cluster's address or workers without a cluster", expected="--executor ray")
    return Local()
