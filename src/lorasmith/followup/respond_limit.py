"""Is the limit of new tokens large enough? Asked after the first hundred rows, not after ten hours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorasmith.records.base import Finding

CHECK_ROWS = 100
"""A share of cut rows is then known to within 10 points (95 %, binomial), enough to see that it is wrong."""
TOLERATED = 0.02
"""Share of cut rows above which a warning is due; the suggested limit aims at half of it."""
_STEP = 64
_LONGEST_CYCLE = 48
_REPEATS = 4


@dataclass(frozen=True)
class Length:
    """How one row ended."""

    tokens: int
    cut: bool
    repeats: bool
    """Cut in the middle of a loop: no limit is long enough for it."""


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether the text ends in the same few tokens, four times over."""
    for cycle in range(1, min(_LONGEST_CYCLE, len(tokens) // _REPEATS) + 1):
        tail = tokens[-cycle * _REPEATS :]
        if all(tail[place] == tail[place + cycle] for place in range(len(tail) - cycle)):
            return True
    return False


def judge_limit(lengths: Sequence[Length], limit: int, most: int | None) -> Finding | None:
    """A warning with a suggested limit when more than `TOLERATED` of these rows were cut, else None.

    `most` is the largest limit that the model's context leaves. The suggestion takes the ends of the rows for
    a constant hazard h, estimated as the number of rows that ended over the tokens of all rows (the maximum
    likelihood estimate for lengths cut off on the right), so that a share c cut at L leaves a share
    c·exp(−h·(L' − L)) cut at L'.
    """
    cut = sum(length.cut for length in lengths)
    if not lengths or cut / len(lengths) <= TOLERATED:
        return None
    loops = sum(length.repeats for length in lengths)
    found = (
        f"{cut} of the first {len(lengths)} rows ({cut / len(lengths):.0%}) were cut off at {limit} tokens"
    )
    if loops:
        found += f"; {loops} of them repeat themselves, which a larger limit does not mend"
    suggested = suggest_limit(lengths, limit)
    if most is not None:
        suggested = min(suggested, most)
    remedy = (
        f"give --max-new-tokens {suggested} and another --output"
        if suggested > limit
        else "the model's context leaves no larger limit: shorten the prompts, or take a model that stops"
    )
    return Finding(severity="warning", code="cut-off", message=found, expected="2 % or less", remedy=remedy)


def suggest_limit(lengths: Sequence[Length], limit: int) -> int:
    """The limit that should leave half of `TOLERATED` cut; loops are left out of the reckoning."""
    sound = [length for length in lengths if not length.repeats]
    cut = sum(length.cut for length in sound)
    ended = len(sound) - cut
    if not cut:
        return limit
    if not ended:
        return 4 * limit  # nothing is known but that it is too small
    hazard = ended / sum(length.tokens for length in sound)
    more = math.log(cut / len(sound) / (TOLERATED / 2)) / hazard
    return math.ceil((limit + more) / _STEP) * _STEP
