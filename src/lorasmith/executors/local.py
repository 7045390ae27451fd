"""Work through chunks of rows in this process: split what does not fit, skip what is in the journal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from lorasmith.executors.chunks import Waiting, Work
from lorasmith.executors.log import ChunkLog
from lorasmith.files.journal import Journal, Rows

R = TypeVar("R")


def work_through(
    chunks: Iterable[Rows], work: Work[R], journal: Journal | None = None, log: ChunkLog | None = None
) -> Iterator[tuple[Rows, R]]:
    """Each chunk with its result; a split chunk comes as its parts, none left out, none twice.

    What the journal holds comes first, unpacked; the rest is computed and written to it, with the conditions
    that it was computed under, which `log` gets as well. Raises `MemoryLimitError` when even the smallest
    part does not fit.
    """
    log = ChunkLog() if log is None else log
    waiting = Waiting(chunks, work, journal)
    yield from kept(journal, work, log)
    while rows := waiting.take():
        # The next attempt starts outside the except block: inside it, the traceback would keep the
        # tensors of the failed attempt alive.
        outcome = _attempt(rows, work)
        if isinstance(outcome, _TooLarge):
            work.release()
            waiting.too_large(rows, outcome.message)
            continue
        conditions = work.conditions()
        if journal:
            journal.add(rows, work.pack(outcome), waiting.limit, conditions.model_dump())
        log.note(rows, conditions)
        yield rows, outcome


def kept(journal: Journal | None, work: Work[R], log: ChunkLog) -> Iterator[tuple[Rows, R]]:
    """What the journal holds, unpacked."""
    if journal:
        for rows, packed in journal.entries():
            log.note_kept(rows, journal)
            yield rows, work.unpack(rows, packed)


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
