"""A training batch in parts that fit in memory; their gradients add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar


class Tokens(Protocol):
    """Anything that is a row of tokens."""

    @property
    def ids(self) -> list[int]:
        """Prompt and response."""


R = TypeVar("R", bound=Tokens)


def split_batch(rows: Sequence[R], most_tokens: int) -> Iterator[list[R]]:
    """A training batch in parts of at most `most_tokens` padded tokens, or of one row, shortest rows first.

    The gradients of the parts add up to the batch's; only one part's activations are in memory.
    """
    part: list[R] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if part and len(row.ids) * (len(part) + 1) > most_tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part
