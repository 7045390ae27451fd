"""Chunks that wait to be computed: those that do not fit in memory split, finished ones left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol, TypeVar

from lorasmith.errors import MemoryLimitError
from lorasmith.files.journal import Journal, Rows
from lorasmith.records.conditions import Conditions

R = TypeVar("R")


class Work(Protocol[R]):
    """What is done to a chunk, and how a chunk and its result are handled."""

    def run(self, rows: Rows) -> R:
        """The result of one chunk."""

    def split(self, rows: Rows) -> list[Rows]:
        """The parts of a chunk, none when it cannot be split; always the same for the same chunk."""

    def size(self, rows: Rows) -> int:
        """What it takes of memory, in any unit."""

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether an error is worth a split."""

    def release(self) -> None:
        """Give memory back before the next attempt."""

    def pack(self, result: R) -> bytes:
        """For the journal."""

    def unpack(self, rows: Rows, packed: bytes) -> R:
        """From the journal."""

    def conditions(self) -> Conditions:
        """What may decide the last digits of its results in this process."""


class Undivided:
    """What pieces of work have in common that are never split, such as a shard."""

    def split(self, rows: Rows) -> list[Rows]:
        """No parts."""
        return []

    def size(self, rows: Rows) -> int:
        """How many pieces."""
        return len(rows)

    def out_of_memory(self, error: BaseException) -> bool:
        """There is nothing to split: the work itself says what it lacks."""
        return False

    def release(self) -> None:
        """Nothing is held."""


class Waiting:
    """The chunks to come; once a chunk of some size did not fit, later ones of that size are split ahead."""

    def __init__(self, chunks: Iterable[Rows], work: Work[R], journal: Journal | None) -> None:
        self._work: Work[R] = work
        self._line: deque[Rows] = deque()
        for chunk in chunks:
            self._line.extend(remaining(chunk, work, journal) if journal else [chunk])
        self.limit = journal.limit if journal else None
        """Smallest size that did not fit so far."""

    def __len__(self) -> int:
        return len(self._line)

    def take(self) -> Rows | None:
        """The next chunk, None when there is none now."""
        while self._line:
            rows = self._line.popleft()
            too_large = self.limit is not None and self._work.size(rows) >= self.limit
            parts = self._work.split(rows) if too_large else []
            if not parts:
                return rows
            self._line.extendleft(reversed(parts))
        return None

    def again(self, rows: Rows) -> None:
        """A chunk that was taken but not computed."""
        self._line.appendleft(rows)

    def too_large(self, rows: Rows, message: str) -> None:
        """A chunk did not fit: its parts come next; `MemoryLimitError` when it has none."""
        size = self._work.size(rows)
        self.limit = size if self.limit is None else min(self.limit, size)
        parts = self._work.split(rows)
        if not parts:
            raise MemoryLimitError(
                f"too little memory even for the smallest piece of work: {message}",
                remedy="shorten the longest rows (--max-length), or use a machine with more memory",
            )
        self._line.extendleft(reversed(parts))


def remaining(chunk: Rows, work: Work[R], journal: Journal) -> list[Rows]:
    """What is left of a chunk, in the same parts as when it was interrupted: the results keep their bytes."""
    if chunk in journal:
        return []
    if not journal.touches(chunk):
        return [chunk]
    return [rest for part in work.split(chunk) for rest in remaining(part, work, journal)]
