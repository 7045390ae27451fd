"""Work through chunks in this process; a chunk that does not fit in memory is split and goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from lorasmith.errors import MemoryLimitError

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


def work_through(
    chunks: Iterable[Chunk],
    work: Callable[[Chunk], Result],
    *,
    split: Callable[[Chunk], list[Chunk]],
    out_of_memory: Callable[[BaseException], bool],
    release: Callable[[], None],
) -> Iterator[tuple[Chunk, Result]]:
    """Each chunk with its result, in order; a split chunk comes as its parts, none left out, none twice.

    `split` gives the parts of a chunk, none when it cannot be split; `out_of_memory` tells which errors are
    worth a split; `release` gives memory back before the next attempt. Once a chunk was split, the later ones
    are not split ahead: they are smaller, or split by themselves. Raises `MemoryLimitError` when even the
    smallest part does not fit.
    """
    for chunk in chunks:
        waiting = [chunk]
        while waiting:
            part = waiting.pop(0)
            # The next attempt starts outside the except block: inside it, the traceback would keep the
            # tensors of the failed attempt alive.
            outcome = _attempt(part, work, out_of_memory)
            if not isinstance(outcome, _TooLarge):
                yield part, outcome
                continue
            release()
            parts = split(part)
            if not parts:
                raise MemoryLimitError(
                    f"too little memory even for the smallest piece of work: {outcome.message}",
                    remedy="shorten the longest rows (--max-length), or use a machine with more memory",
                )
            waiting[:0] = parts


class _TooLarge:
    """The outcome of a chunk that did not fit."""

    def __init__(self, message: str) -> None:
        self.message = message


def _attempt(
    part: Chunk, work: Callable[[Chunk], Result], out_of_memory: Callable[[BaseException], bool]
) -> Result | _TooLarge:
    try:
        return work(part)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return _TooLarge(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
