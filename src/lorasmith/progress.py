"""How long work tells a person where it stands, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Called with the number of units that have just been finished."""


class Progress(Protocol):
    """Opens a bar for one long step: `with progress("Merge", total=n, unit="B") as advance: advance(k)`."""

    def __call__(self, label: str, *, total: int, unit: str) -> AbstractContextManager[Advance]:
        """`total` is in `unit`s (for example "tok", "B", "row")."""


@contextmanager
def silent(label: str, *, total: int, unit: str) -> Iterator[Advance]:
    """The progress of a library call that nobody watches."""
    yield lambda count: None


class Watcher(Protocol):
    """Follows a run, or one command that takes hours: headings, bars, and what is found on the way."""

    @property
    def progress(self) -> Progress:
        """How bars are opened."""

    def step(self, number: int, total: int, title: str) -> None:
        """A step begins."""

    def finished(self, stage: str, *, reused: bool, seconds: float) -> None:
        """A stage is done, now or by an earlier command with the same inputs."""

    def show(self, stage: str, record: object) -> None:
        """The record that a stage left, or a finding that has to be known while it still runs."""

    def generated(self, tokens: int) -> None:
        """A model wrote so many more tokens: rows alone tell too little while each takes minutes."""


class Unwatched:
    """The watcher of a library call that nobody watches."""

    progress: Progress = staticmethod(silent)

    def step(self, number: int, total: int, title: str) -> None:
        """Nobody is told."""

    def finished(self, stage: str, *, reused: bool, seconds: float) -> None:
        """Nobody is told."""

    def show(self, stage: str, record: object) -> None:
        """Nobody is told."""

    def generated(self, tokens: int) -> None:
        """Nobody is told."""
