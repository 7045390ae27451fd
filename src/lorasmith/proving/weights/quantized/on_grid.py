"""A merge back onto its base's grid: is each code that of the point which the real number belongs to?

The rule that is held: x = W + Σ c·L·R in real arithmetic, W the base's own number, goes to the nearest grid
point; from halfway between two to the one that is nearer to W; beyond the grid to its end. A dithered x
between neighbours a < b goes to b exactly if x > a + t·(b − a), t being the element's threshold. A code
whose number is W's stays the base's; of several codes for another number it is the smallest.

So each stored number m is right for the x of one interval, whose ends lie between m and its neighbours. It
is compared with x in float64 within the error's bound, and where that leaves doubt in rational numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from math import prod

import numpy as np
import torch

from lorasmith.proving.weights.blocks import FIRST, LoadedTerm, Tally, Wrong, sums
from lorasmith.proving.weights.check import load_term
from lorasmith.proving.weights.dither import Dither, make_dither
from lorasmith.proving.weights.formula import Expected
from lorasmith.proving.weights.judge import exact_sum
from lorasmith.proving.weights.quantized.stored import Elements, Found
from lorasmith.proving.weights.rounding import Floats, Ints, Mask

_ELEMENTS = 1 << 16
"""Elements looked at together: their dozens of arrays stay near a core."""
_SLACK = 2.0**-49
"""Relative: more than the roundings of an interval's ends and of what they are compared with."""


@dataclass(frozen=True)
class _Numbers:
    """Grid points around what the merge stores; all [n]."""

    base: Floats
    stored: Floats
    below: Floats
    """The next lower number of the grid; minus infinity at its end."""
    above: Floats
    code_right: Mask
    """Whether the code is the one that stands for its number."""
    place: Ints
    """Where the stored number stands among the grid's points."""


def rows_to_check(expected: Expected, base: Found, merged: Found) -> Iterator[Callable[[], Tally]]:
    """Every element of a weight whose codes an update may have changed: a part of its rows each, in order."""
    terms = tuple(load_term(term, expected, None) for term in expected.terms)
    columns = base.shape[-1]
    dither = None if expected.seed is None else make_dither(expected.seed, expected.name, columns)
    step = max(1, _ELEMENTS // columns)
    rows = prod(base.shape[:-1])
    edges = {0, rows}
    for term in terms:
        edges |= {min(rows, term.first_row), min(rows, term.first_row + term.left.shape[0])}
    for low, high in pairwise(sorted(edges)):
        here = tuple(t for t in terms if t.first_row <= low < t.first_row + t.left.shape[0])
        for start in range(low, high, step):
            yield partial(_check_rows, base, merged, here, start, min(start + step, high), dither)


def _check_rows(
    base: Found,
    merged: Found,
    terms: tuple[LoadedTerm, ...],
    start: int,
    stop: int,
    dither: Dither | None,
) -> Tally:
    columns = base.shape[-1]
    first, count = start * columns, (stop - start) * columns
    elements, stored = base.read(first, count), merged.read(first, count)
    source = base.numbers(elements).reshape(-1, columns)
    if terms:
        x_rows, reach, relative = sums(source, terms, start, torch.float64)
        error = (relative * (source.abs() + reach)).reshape(-1).numpy()
        x = x_rows.reshape(-1).numpy()
    else:
        x, error = source.reshape(-1).numpy(), np.zeros(count)
    numbers = _numbers(base, elements, stored, source.reshape(-1).numpy())
    shares = np.full(count, 0.5)
    # Rows that nothing is added to keep their numbers under either rule.
    dithered = dither is not None and bool(terms)
    if dither is not None and terms:
        shares = dither.rows(start, stop).reshape(-1)
    with np.errstate(invalid="ignore"):  # an end at infinity stays one
        low = numbers.below + shares * (numbers.stored - numbers.below)
        high = numbers.stored + shares * (numbers.above - numbers.stored)
    low[np.isneginf(numbers.below)], high[np.isposinf(numbers.above)] = -np.inf, np.inf
    size = np.abs(numbers.stored) + np.abs(x)
    for other in (numbers.below, numbers.above):
        size = size + np.where(np.isfinite(other), np.abs(other), 0.0)
    slack = error + _SLACK * size
    right = (x - slack > low) & (x + slack < high)
    wrong = (x + slack < low) | (x - slack > high)
    one_point = numbers.below == numbers.above
    right[one_point], wrong[one_point] = True, False
    tally = Tally(elements=count)
    undecided = np.flatnonzero(~right & ~wrong)
    for k in undecided:
        row, column = divmod(int(k), columns)
        exact = exact_sum(terms, float(numbers.base[k]), start + row, column)
        right[k] = _is_right(numbers, int(k), exact, Fraction(float(shares[k])), dithered=dithered)
    tally.redone = len(undecided)
    right &= numbers.code_right
    if not right.all():
        _enter(tally, base, elements, numbers, x, np.flatnonzero(~right), start)
    return tally


def _numbers(base: Found, elements: Elements, stored: Elements, source: Floats) -> _Numbers:
    points, last = base.points, len(base.points) - 1
    levels, base_levels = base.levels[stored.code], base.levels[elements.code]
    known = levels.isfinite()
    place = torch.searchsorted(points, levels.nan_to_num())
    values = base.values(elements, levels.nan_to_num()).numpy()
    lower = base.values(elements, points[(place - 1).clamp(min=0)])
    upper = base.values(elements, points[(place + 1).clamp(max=last)])
    lower = torch.where(place > 0, lower, -torch.inf * elements.scale.sign())
    upper = torch.where(place < last, upper, torch.inf * elements.scale.sign())
    # With a scale of zero all points are one number, and only the base's code is right.
    zero = elements.scale == 0
    both = torch.stack([lower, upper])
    below, above = both.amin(dim=0), both.amax(dim=0)
    at = torch.from_numpy(values)
    below, above = torch.where(zero, at, below), torch.where(zero, at, above)
    # The smallest code of each point: the first to stand for it.
    smallest = torch.stack([torch.nonzero(base.levels == point)[0, 0] for point in points])[place]
    same = (levels == base_levels) | zero
    code_right = known & torch.where(same, stored.code == elements.code, stored.code == smallest)
    return _Numbers(source, values, below.numpy(), above.numpy(), code_right.numpy(), place.numpy())


def _is_right(numbers: _Numbers, k: int, x: Fraction, share: Fraction, *, dithered: bool) -> bool:
    """Whether x lies in the interval of the stored number, in rational numbers."""
    m = Fraction(float(numbers.stored[k]))
    for other, upwards in ((numbers.below[k], False), (numbers.above[k], True)):
        if not np.isfinite(other):
            continue
        neighbour = Fraction(float(other))
        end = m + share * (neighbour - m) if upwards else neighbour + share * (m - neighbour)
        if x == end:
            # A threshold belongs to the lower number; the middle to the number nearer to the base's.
            base = Fraction(float(numbers.base[k]))
            if not (upwards if dithered else abs(m - base) < abs(neighbour - base)):
                return False
        elif (x > end) == upwards:
            return False
    return True


def _enter(
    tally: Tally, base: Found, elements: Elements, numbers: _Numbers, x: Floats, wrong: Ints, start: int
) -> None:
    """Count wrong elements by the number of grid points that they are off, and keep the first."""
    columns = base.shape[-1]
    distances: list[int] = []
    shown: list[Wrong] = []
    for k in wrong:
        one = Elements(
            elements.code[k : k + 1],
            elements.scale[k : k + 1],
            None if elements.shift is None else elements.shift[k : k + 1],
        )
        grid = base.values(one, base.points).numpy()
        nearest = int(np.argmin(np.abs(grid - x[k])))
        distances.append(max(1, abs(nearest - int(numbers.place[k]))))
        if len(shown) < FIRST:
            row, column = divmod(int(k), columns)
            shown.append(
                Wrong(start + row, column, float(numbers.stored[k]), float(grid[nearest]), distances[-1])
            )
    tally.count(np.array(distances, dtype=np.int64))
    tally.first += shown
    tally.stale = int((numbers.stored[wrong] == numbers.base[wrong]).sum())
