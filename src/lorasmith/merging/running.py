"""Pieces that threads are still at work on, while the next ones are read and begun."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

Finish = Callable[[], None]
"""Waits for a piece that was begun and completes it; raises what went wrong with it."""


def nothing_left() -> None:
    """The end of a piece that was made at once."""


class Running:
    """What was begun and not completed yet, in order; the memory that it uses is not to be touched."""

    def __init__(self) -> None:
        self._jobs: deque[Finish] = deque()
        self.begun = 0
        """How many pieces so far."""

    def add(self, finish: Finish) -> None:
        """Take note of a piece that was begun."""
        self._jobs.append(finish)
        self.begun += 1

    def finish(self, count: int) -> None:
        """Complete the first `count` of all pieces, as far as they are not."""
        while self.begun - len(self._jobs) < count:
            self._jobs.popleft()()

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._jobs:
            # After an error: only wait, so that no thread writes into buffers that others use by now.
            with suppress(Exception):
                self._jobs.popleft()()
