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
