"""One block of a merged tensor against its formula: a quick test for most elements, a slow one for the rest.

The quick test computes the formula in float32 or float64 with a bound on its own error, and accepts an
element whose distance to the stored number is certainly below half a unit in the last place. What it does
not accept is computed again in float64 with a bound per element and judged by intervals, and where those
touch a midpoint, in rational numbers. A quick test can therefore cost time, never an answer.

Error bound (Higham, Accuracy and Stability of Numerical Algorithms, 3.1): a sum of n products in any order
is off by at most γ(n)·Σ|products|, γ(n) = n·u/(1 − n·u), u half the distance from 1 to the next number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch

from lorasmith.errors import CheckpointError
from lorasmith.proving import weights_rounding as rounding
from lorasmith.proving.weights_gain import UNIT, Gain, gamma, make_gain, sum_of_squares
from lorasmith.proving.weights_rounding import Floats, Grid, Ints

_FIRST = 16
"""Differences kept per block: the proof lists the first ones."""
_SLOW_ELEMENTS = 1 << 15
"""Elements judged slowly at a time, so that memory stays small when all are wrong."""
_RANK_FOR_FLOAT32 = 64
"""Above it the bound of float32 leaves too much to the slow test."""

BUCKETS = (1, 2, 4, 16, 256, 65536)
"""Lower ends of the classes of distances that the record counts, in ulps."""


@dataclass(frozen=True)
class Wrong:
    """One wrong element, in coordinates of the matrix."""

    row: int
    column: int
    found: float | str
    expected: float | str
    ulps: int


@dataclass
class Tally:
    """What was found in a block, a tensor, or a model."""

    elements: int = 0
    wrong: int = 0
    stale: int = 0
    """Wrong elements that hold what the base holds."""
    near: int = 0
    """Wrong elements that are off by no more than a few roundings of the sum's terms."""
    max_ulps: int = 0
    redone: int = 0
    buckets: dict[int, int] = field(default_factory=dict)
    first: list[Wrong] = field(default_factory=list)
    moved: float = 0.0
    """Σ (merged − base)·ΔW over the wrong elements."""
    wanted: float = 0.0
    """Σ ΔW² over the wrong elements."""

    def add(self, other: Tally) -> None:
        """Take in the tally of the next block."""
        self.elements += other.elements
        self.wrong += other.wrong
        self.stale += other.stale
        self.near += other.near
        self.max_ulps = max(self.max_ulps, other.max_ulps)
        self.redone += other.redone
        self.moved += other.moved
        self.wanted += other.wanted
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.first.extend(other.first[: max(0, _FIRST - len(self.first))])


@dataclass(frozen=True)
class LoadedTerm:
    """A term with its factors at hand."""

    factor: Fraction
    left: torch.Tensor
    right: torch.Tensor
    first_row: int
    right_quick: torch.Tensor
    """R in the type of the quick test."""
    right_norm: float
    """Largest 2-norm of a column of R."""

    def left_rows(self, start: int, count: int) -> torch.Tensor:
        """Rows of L for rows of the matrix."""
        return self.left[start - self.first_row : start - self.first_row + count]


@dataclass(frozen=True)
class Block:
    """Rows of the matrix: what the merge stores, and what goes into the formula."""

    name: str
    grid: Grid
    start: int
    """Row of the whole matrix that the block begins with."""
    found: torch.Tensor
    """[rows, columns] in the grid's type."""
    source: torch.Tensor
    """[rows, columns] in its own type."""
    terms: tuple[LoadedTerm, ...]
    magnitudes: torch.Tensor | None = None
    """DoRA with one norm per row: m for the block's rows."""
    gain: Gain | None = None
    """DoRA with one norm per column."""


def quick_type(grid: Grid, rank: int, source: torch.dtype) -> torch.dtype:
    """The type of the quick test: float32 where its error is far below the grid's half ulp."""
    narrow = grid.fraction_bits <= 10 and rank <= _RANK_FOR_FLOAT32 and source != torch.float64
    return torch.float32 if narrow else torch.float64


def compare(block: Block) -> Tally:
    """Check every element of the block."""
    if block.magnitudes is not None:
        block = replace(block, gain=_row_gain(block, block.magnitudes))
    tally = Tally(elements=block.found.numel())
    doubtful = _quick(block)
    for start in range(0, len(doubtful), _SLOW_ELEMENTS):
        part = doubtful[start : start + _SLOW_ELEMENTS]
        tally.add(_slow(block, part))
    return tally


def _quick(block: Block) -> Ints:
    """Flat positions of the elements that are not certainly right."""
    grid, rank = block.grid, _rank(block)
    kind = torch.float64 if block.gain else quick_type(grid, rank, block.source.dtype)
    smallest = torch.finfo(kind).smallest_normal
    x, reach, bound = sums(block.source, block.terms, block.start, kind)
    if block.gain:
        x.mul_(block.gain.values)
        reach = reach * block.gain.values.abs()
        bound += block.gain.error
    x.sub_(block.found).abs_()
    # |S| ≤ |m| + |x − m| + reach, and |m| is at most twice its power of two: the share of the bound that
    # grows with |m| goes to the coefficient of that power, the share of |x − m| to a common divisor.
    half_ulp = 2.0 ** -(grid.fraction_bits + 1)
    coefficient = (half_ulp - 4 * bound) / (1 + 2 * bound) * (1 - 2.0**-20)
    offset = ((2 * bound) * reach + (rank + 1) * 4 * smallest).to(kind)
    if not coefficient > 0:
        return np.arange(x.numel())
    power = _power_below(grid, block.found, kind)
    threshold = torch.sub(power.mul_(coefficient), offset)
    accepted = torch.lt(x, threshold)
    if bool(accepted.all()):
        return np.empty(0, np.int64)
    return (~accepted).view(-1).nonzero().view(-1).numpy()


def _rank(block: Block) -> int:
    return sum(term.right.shape[0] for term in block.terms)


def sums(
    source: torch.Tensor, terms: Sequence[LoadedTerm], start: int, kind: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """S + Σ c·L·R of a block, a bound [rows, 1] on Σ|c·L|·|R| per element, and the relative bound b.

    An element is off by at most b·(|S| + that bound).
    """
    x = source.to(kind, copy=True)
    reach = torch.zeros(len(x), 1, dtype=torch.float64)
    for term in terms:
        left = term.left_rows(start, len(x)).to(torch.float64) * float(term.factor)
        reach += torch.linalg.vector_norm(left, dim=1, keepdim=True) * term.right_norm
        x.addmm_(left.to(kind), term.right_quick.to(kind))
    # A product of rounded factors carries three more roundings each, the sum with S one, the difference one.
    rank = sum(term.right.shape[0] for term in terms)
    return x, reach, gamma(rank + 8, torch.finfo(kind).eps / 2)


def _row_gain(block: Block, magnitudes: torch.Tensor) -> Gain:
    v, reach, bound = sums(block.source, block.terms, block.start, torch.float64)
    squares, error = sum_of_squares(v)
    columns = v.shape[1]
    spread = bound * (squares.sqrt() + 2 * reach[:, 0] * math.sqrt(columns))
    cached: dict[int, Fraction] = {}

    def exact_square(row: int) -> Fraction:
        if row not in cached:
            source = block.source[row].tolist()
            total = sum((_exact_sum(block, source[j], row, j) ** 2 for j in range(columns)), Fraction(0))
            cached[row] = total
        return cached[row]

    return make_gain(
        squares, spread, error, magnitudes, per_row=True, exact_square=exact_square, name=block.name
    )


def _power_below(grid: Grid, found: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """The power of two at or below the number before |found|; 0 for zeros and subnormals.

    The number before it decides how far the interval reaches towards zero, where it is narrowest.
    """
    bits = found.view(grid.stored_as)
    exponent_mask = grid.infinity
    before = torch.bitwise_and(bits, (1 << grid.sign) - 1).sub_(1).clamp_(min=0)
    return before.bitwise_and_(exponent_mask).view(grid.dtype).to(kind)


def _slow(block: Block, flat: Ints) -> Tally:
    """Judge the elements at these flat positions one by one."""
    grid, columns = block.grid, block.found.shape[1]
    rows, cols = np.divmod(flat, columns)
    at = torch.from_numpy(flat)
    magnitude, negative = grid.magnitudes(block.found.reshape(-1)[at])
    source = block.source.reshape(-1)[at].to(torch.float64).numpy()
    finite = np.isfinite(source)
    if block.terms and not finite.all():
        raise CheckpointError(f"the base's tensor {block.name!r} is not finite", expected="finite numbers")
    x, error, size = _formula(block, source, rows, cols)
    base_sign = np.signbit(source)
    verdict = rounding.judge(grid, magnitude, negative, x, error, base_sign)
    expected, expected_negative = rounding.nearest(grid, np.nan_to_num(x), base_sign)
    right, open_ = verdict.right.copy(), np.flatnonzero(verdict.open)
    if not finite.all():
        # Infinities and NaNs that a buffer holds on purpose stay what they are when its precision changes.
        found = np.where(magnitude > grid.infinity, np.nan, np.where(negative, -np.inf, np.inf))
        same = (found == source) | (np.isnan(found) & np.isnan(source))
        right[~finite] = (same & (magnitude >= grid.infinity))[~finite]
        open_ = open_[finite[open_]]
    # The distance of a wrong element is exact too where its neighbours' midpoint is out of the error's reach.
    for k in open_:
        wanted, zero = _exact(block, float(source[k]), int(rows[k]), int(cols[k]))
        expected[k], expected_negative[k] = wanted
        free_zero = zero and magnitude[k] == 0 and not negative[k]
        finite = magnitude[k] < grid.infinity
        right[k] = finite and (free_zero or (int(magnitude[k]), bool(negative[k])) == wanted)
    tally = Tally(redone=len(open_))
    wrong = np.flatnonzero(~right)
    if len(wrong):
        distance = np.maximum(
            rounding.ulps(magnitude[wrong], negative[wrong], expected[wrong], expected_negative[wrong]), 1
        )
        _count(tally, distance)
        for k, far in zip(wrong[:_FIRST], distance[:_FIRST], strict=True):
            shown = grid.show(int(magnitude[k]), bool(negative[k]))
            wanted_shown = grid.show(int(expected[k]), bool(expected_negative[k]))
            tally.first.append(Wrong(block.start + int(rows[k]), int(cols[k]), shown, wanted_shown, int(far)))
        _explain(tally, grid, magnitude[wrong], negative[wrong], source[wrong], x[wrong], size[wrong])
    return tally


def _formula(block: Block, source: Floats, rows: Ints, cols: Ints) -> tuple[Floats, Floats, Floats]:
    """x, a bound on its error, and Σ|summands|, in float64, for single elements."""
    x, size, rank = source.copy(), np.abs(source), 0
    touched = np.zeros(len(x), np.bool_)
    for term in block.terms:
        left = term.left_rows(block.start, len(block.found))[torch.from_numpy(rows)].to(torch.float64)
        right = term.right[:, torch.from_numpy(cols)].T.to(torch.float64)
        products = (left * right).numpy() * float(term.factor)
        touched |= ((left != 0) & (right != 0)).any(dim=1).numpy()
        x += products.sum(axis=1)
        size += np.abs(products).sum(axis=1)
        rank += products.shape[1]
    # Each product is rounded twice and c once, the sums rank + number of terms times; all in one bound.
    bound = gamma(rank + len(block.terms) + 4, UNIT)
    error = np.where(touched, bound * size * (1 + 2.0**-40) + rank * 2.0**-1070, 0.0)
    if block.gain:
        values = block.gain.values.numpy()
        gain = values[rows, 0] if block.gain.per_row else values[0, cols]
        x, size = x * gain, size * np.abs(gain)
        # Where x is zero and exact it stays so; all else takes on the gain's own error.
        error = error * np.abs(gain) * (1 + 2.0**-40) + np.abs(x) * (block.gain.error + 4 * UNIT)
    return x, error, size


def _exact(block: Block, source: float, row: int, col: int) -> tuple[tuple[int, bool], bool]:
    """The stored number (magnitude, minus) that is right for an element, and whether x is exactly zero."""
    v, gain, sign = _exact_sum(block, source, row, col), block.gain, math.copysign(1, source) < 0
    if gain is None:
        return rounding.exact_nearest(block.grid, v, sign), v == 0
    at = row if gain.per_row else col
    m = Fraction(float(gain.magnitudes[at]))
    if m * v == 0:
        return (0, sign), True
    # |m·V|/‖V‖ against y ≥ 0 is decided by the squares, which are rational.
    left, square = (m * v) ** 2, gain.exact_square(at)
    magnitude = rounding.nearest_magnitude(
        block.grid, lambda y: (left > y * y * square) - (left < y * y * square)
    )
    return (magnitude, m * v < 0), False


def _exact_sum(block: Block, source: float, row: int, col: int) -> Fraction:
    """S + Σ c·L·R of one element as a rational number."""
    return exact_sum(block.terms, source, block.start + row, col)


def exact_sum(terms: Sequence[LoadedTerm], source: float, row: int, col: int) -> Fraction:
    """The same by the row of the whole matrix."""
    total = Fraction(source)
    for term in terms:
        left = term.left[row - term.first_row].tolist()
        total += term.factor * rounding.exact_dot(left, term.right[:, col].tolist())
    return total


def compare_bytes(found: torch.Tensor, source: torch.Tensor, first_row: int) -> Tally:
    """Of a tensor that nothing changes: it has the base's bytes, signs of zeros and NaNs included.

    Both are matrices of one type. The distance of integers is their difference, of numbers the count of
    numbers between.
    """
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.dtype.itemsize]
    a, b = found.view(integer), source.view(integer)
    if torch.equal(a, b):
        return Tally(elements=found.numel())
    flat = a.ne(b).reshape(-1).nonzero().view(-1)
    tally = Tally(elements=found.numel())
    found, source = found.reshape(-1)[flat], source.reshape(-1)[flat]
    _count(tally, np.maximum(_steps(found, source), 1))
    for k in range(min(_FIRST, len(flat))):
        row, column = divmod(int(flat[k]), a.shape[1])
        far = int(np.maximum(_steps(found[k : k + 1], source[k : k + 1]), 1)[0])
        tally.first.append(Wrong(first_row + row, column, _show(found[k]), _show(source[k]), far))
    return tally


def _steps(a: torch.Tensor, b: torch.Tensor) -> Ints:
    """Distances of stored numbers of one type, at most 2⁶²."""
    if a.dtype.is_floating_point:
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
        least = torch.iinfo(width).min
        a, b = (torch.where(bits < 0, least - 1 - bits, bits) for bits in (a.view(width), b.view(width)))
    steps = (a.double() - b.double()).abs().clamp(max=2.0**62)
    return steps.long().numpy()


def _show(value: torch.Tensor) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _count(tally: Tally, distance: Ints) -> None:
    tally.wrong = len(distance)
    tally.max_ulps = int(distance.max())
    ends = (*BUCKETS[1:], None)
    for low, end in zip(BUCKETS, ends, strict=True):
        inside = (distance >= low) & (distance < end) if end is not None else distance >= low
        if inside.any():
            tally.buckets[low] = int(inside.sum())


def _explain(
    tally: Tally,
    grid: Grid,
    magnitude: Ints,
    negative: rounding.Mask,
    source: Floats,
    x: Floats,
    size: Floats,
) -> None:
    """What a person wants to know of wrong elements: still the base's? the update, times what?"""
    nothing = np.zeros_like(source)
    base = rounding.judge(grid, magnitude, negative, source, nothing, np.signbit(source))
    tally.stale = int(base.right.sum())
    found = np.where(negative, -1.0, 1.0) * grid.value(np.minimum(magnitude, grid.infinity))
    update = x - source
    tally.near = int((np.abs(found - x) <= size * 2.0 ** (1 - grid.fraction_bits)).sum())
    with np.errstate(all="ignore"):
        moved, wanted = float(((found - source) * update).sum()), float((update * update).sum())
    if np.isfinite(moved) and np.isfinite(wanted):
        tally.moved, tally.wanted = moved, wanted
