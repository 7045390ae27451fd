"""Work through chunks of rows in this process: split what does not fit, skip what is in the journal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from lorasmith.errors import MemoryLimitError
from lorasmith.files.journal import Journal, Rows

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


def work_through(
    chunks: Iterable[Rows], work: Work[R], journal: Journal | None = None
) -> Iterator[tuple[Rows, R]]:
    """Each chunk with its result; a split chunk comes as its parts, none left out, none twice.

    What the journal holds comes first, unpacked; the rest is computed and written to it. Once a chunk of
    some size did not fit, later ones of that size are split ahead. Raises `MemoryLimitError` when even the
    smallest part does not fit.
    """
    waiting: list[Rows] = []
    for chunk in chunks:
        waiting.extend(remaining(chunk, work, journal) if journal else [chunk])
    if journal:
        for rows, packed in journal.entries():
            yield rows, work.unpack(rows, packed)
    limit = journal.limit if journal else None
    waiting.reverse()
    while waiting:
        rows = waiting.pop()
        parts = work.split(rows) if limit is not None and work.size(rows) >= limit else []
        if not parts:
            # The next attempt starts outside the except block: inside it, the traceback would keep the
            # tensors of the failed attempt alive.
            outcome = _attempt(rows, work)
            if not isinstance(outcome, _TooLarge):
                if journal:
                    journal.add(rows, work.pack(outcome), limit)
                yield rows, outcome
                continue
            work.release()
            limit = work.size(rows)
            parts = work.split(rows)
            if not parts:
                raise MemoryLimitError(
                    f"too little memory even for the smallest piece of work: {outcome.message}",
                    remedy="shorten the longest rows (--max-length), or use a machine with more memory",
                )
        waiting.extend(reversed(parts))


def remaining(chunk: Rows, work: Work[R], journal: Journal) -> list[Rows]:
    """What is left of a chunk, in the same parts as when it was interrupted: the results keep their bytes."""
    if chunk in journal:
        return []
    if not journal.touches(chunk):
        return [chunk]
    return [rest for part in work.split(chunk) for rest in remaining(part, work, journal)]


class _TooLarge:
    """The outcome of a chunk that did not fit."""

    def __init__(self, error: BaseException) -> None:
        self.message = (str(error).strip() or type(error).__name__).splitlines()[0]


def _attempt(rows: Rows, work: Work[R]) -> R | _TooLarge:
    try:
        return work.run(rows)
    except Exception as error:
        if not work.out_of_memory(error):
            raise
        return _TooLarge(error)
