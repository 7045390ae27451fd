"""What the quick test does not accept, judged one by one: by intervals in float64, or in rational numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from lorasmith.errors import CheckpointError
from lorasmith.proving.weights import rounding
from lorasmith.proving.weights.blocks import (
    FIRST,
    Gain,
    LoadedTerm,
    RowBlock,
    Tally,
    Wrong,
    make_gain,
    sum_of_squares,
    sums,
)
from lorasmith.proving.weights.dither import Dither
from lorasmith.proving.weights.quick import element_values
from lorasmith.proving.weights.rounding import Floats, Grid, Ints, Mask


def float64_is_exact(block: RowBlock, source: Floats, size: Floats, rows: Ints, cols: Ints) -> Mask:
    """Where every sum and product of the formula is a number of float64, so that nothing was rounded.

    All are multiples of the smallest last bit of any product; below 2⁵³ of that in all, they fit.
    """
    if block.gain:
        return np.zeros(len(source), np.bool_)
    granule = _last_bit(source)
    for term in block.terms:
        factor = float(term.factor)
        if Fraction(factor) != term.factor:
            return np.zeros(len(source), np.bool_)
        left = term.left_rows(block.start, len(block.stored))[torch.from_numpy(rows)].double().numpy()
        right = term.right_columns[torch.from_numpy(cols)].double().numpy()
        bits = _last_bit(left) * _last_bit(right)
        granule = np.minimum(granule, bits.min(axis=1) * min(_last_bit(np.array([factor]))[0], 1.0))
    # Twice the size leaves room for the size's own rounding; tiny granules could themselves be rounded.
    exact: Mask = (2 * size < granule * 2.0**53) & (granule > 2.0**-900)
    return exact


def _last_bit(x: Floats) -> Floats:
    """The power of two of the last set bit of each number; of zero a large one."""
    fraction, exponent = np.frexp(x)
    digits = np.abs(np.ldexp(fraction, 53)).astype(np.int64)
    return np.where(x == 0, 2.0**400, np.ldexp((digits & -digits).astype(np.float64), exponent - 53))


def decide(
    block: RowBlock, source: float, row: int, col: int, guess: int, share: Fraction | None
) -> tuple[tuple[int, bool], bool]:
    """The stored number (magnitude, minus) that is right for an element, and whether x is exactly zero.

    `share` is the element's where the merge is dithered.
    """
    v, gain, sign = exact_element(block, source, row, col), block.gain, math.copysign(1, source) < 0
    if gain is None:
        return rounding.exact_nearest(block.grid, v, sign, guess, share), v == 0
    at = row if gain.per_row else col
    m = Fraction(float(gain.magnitudes[at]))
    if m * v == 0:
        return (0, sign), True
    # |m·V|/‖V‖ against y ≥ 0 is decided by the squares, which are rational.
    left, square = (m * v) ** 2, gain.exact_square(at)
    magnitude = rounding.nearest_magnitude(
        block.grid, lambda y: (left > y * y * square) - (left < y * y * square), guess, share
    )
    return (magnitude, m * v < 0), False


def exact_element(block: RowBlock, source: float, row: int, col: int) -> Fraction:
    """S + Σ c·L·R of one element as a rational number."""
    return exact_sum(block.terms, source, block.start + row, col)


def exact_sum(terms: Sequence[LoadedTerm], source: float, row: int, col: int) -> Fraction:
    """The same by the row of the whole matrix."""
    total = Fraction(source)
    for term in terms:
        left = term.left[row - term.first_row].tolist()
        total += term.factor * rounding.exact_dot(left, term.right[:, col].tolist())
    return total


def row_gain(block: RowBlock, magnitudes: torch.Tensor) -> Gain:
    """The gain of each row of a block, whose norm takes the row alone."""
    v, reach, bound = sums(block.source, block.terms, block.start, torch.float64)
    squares, error = sum_of_squares(v)
    columns = v.shape[1]
    spread = bound * (squares.sqrt() + 2 * reach[:, 0] * math.sqrt(columns))
    cached: dict[int, Fraction] = {}

    def exact_square(row: int) -> Fraction:
        if row not in cached:
            source = block.source[row].tolist()
            total = sum((exact_element(block, source[j], row, j) ** 2 for j in range(columns)), Fraction(0))
            cached[row] = total
        return cached[row]

    return make_gain(
        squares, spread, error, magnitudes, per_row=True, exact_square=exact_square, name=block.name
    )


@dataclass(frozen=True)
class _Elements:
    """Some elements of a block; all [n]."""

    rows: Ints
    """Rows within the block."""
    cols: Ints
    magnitude: Ints
    negative: Mask
    source: Floats
    x: Floats
    error: Floats
    """A bound on the error of x."""
    size: Floats
    """A bound on Σ|summands|."""
    share: Floats | None
    """The share t of each element, where the merge is dithered."""

    def judge(self, grid: Grid) -> rounding.Verdict:
        """Whether what is stored is right, as far as x and its error tell."""
        sign = np.signbit(self.source)
        return rounding.judge_rounding(
            grid, self.magnitude, self.negative, self.x, self.error, sign, self.share
        )


def judge_elements(block: RowBlock, flat: Ints, dither: Dither | None) -> Tally:
    """Check the elements at these flat positions of the block, and tally those that are wrong."""
    grid, these = block.grid, _read(block, flat, dither)
    finite = np.isfinite(these.source)
    verdict = _verdict(block, these, finite)
    right, open_ = verdict.right.copy(), verdict.open
    if not finite.all():
        right[~finite] = _kept(grid, these)[~finite]
        open_ &= finite
    if right.all():
        return Tally()
    expected, expected_negative = np.zeros_like(these.magnitude), np.zeros_like(these.negative)
    unsure = np.flatnonzero(~right)
    share = None if these.share is None else these.share[unsure]
    expected[unsure], expected_negative[unsure] = rounding.nearest(
        grid, np.nan_to_num(these.x[unsure]), np.signbit(these.source[unsure]), share
    )
    undecided = np.flatnonzero(open_)
    # The distance of a wrong element is exact too where its neighbours' midpoint is out of the error's reach.
    for k in undecided:
        expected[k], expected_negative[k], right[k] = _decide(block, these, int(k), int(expected[k]))
    tally = Tally(redone=len(undecided))
    if not right.all():
        _enter(tally, block, these, np.flatnonzero(~right), expected, expected_negative)
    return tally


def _read(block: RowBlock, flat: Ints, dither: Dither | None) -> _Elements:
    rows, cols = np.divmod(flat, block.stored.shape[1])
    at = torch.from_numpy(flat)
    magnitude, negative = block.grid.magnitudes(block.stored.reshape(-1).index_select(0, at))
    source = block.source.reshape(-1).index_select(0, at).to(torch.float64).numpy()
    if block.terms and not np.isfinite(source).all():
        raise CheckpointError(f"the base's tensor {block.name!r} is not finite", expected="finite numbers")
    x, error, size = element_values(block, source, rows, cols)
    share = None if dither is None else dither.shares(block.start + rows, cols)
    return _Elements(rows, cols, magnitude, negative, source, x, error, size, share)


def _verdict(block: RowBlock, these: _Elements, finite: Mask) -> rounding.Verdict:
    """By x and its error; where that is open and float64 rounded nothing, by x alone.

    Such midpoints are common where factors have few bits.
    """
    verdict = these.judge(block.grid)
    at = np.flatnonzero(verdict.open & finite)
    if not len(at):
        return verdict
    exact = float64_is_exact(block, these.source[at], these.size[at], these.rows[at], these.cols[at])
    if not exact.any():
        return verdict
    error = these.error.copy()
    error[at[exact]] = 0.0
    return replace(these, error=error).judge(block.grid)


def _kept(grid: Grid, these: _Elements) -> Mask:
    """Infinities and NaNs that a buffer holds on purpose stay what they are when its precision changes."""
    infinite = np.where(these.negative, -np.inf, np.inf)
    stored = np.where(these.magnitude > grid.infinity, np.nan, infinite)
    same = (stored == these.source) | (np.isnan(stored) & np.isnan(these.source))
    kept: Mask = same & (these.magnitude >= grid.infinity)
    return kept


def _decide(block: RowBlock, these: _Elements, k: int, guess: int) -> tuple[int, bool, bool]:
    """Magnitude and sign that are right in rational numbers, and whether they are what is stored."""
    share = None if these.share is None else Fraction(float(these.share[k]))
    place = int(these.rows[k]), int(these.cols[k])
    wanted, zero = decide(block, float(these.source[k]), *place, guess, share)
    stored = int(these.magnitude[k]), bool(these.negative[k])
    # A sum that is exactly zero has no sign of its own, so that +0 is right beside the base's -0.
    right = stored[0] < block.grid.infinity and ((zero and stored == (0, False)) or stored == wanted)
    return *wanted, right


def _enter(
    tally: Tally, block: RowBlock, these: _Elements, wrong: Ints, expected: Ints, expected_negative: Mask
) -> None:
    """Count the wrong elements and keep the first."""
    grid, magnitude, negative = block.grid, these.magnitude, these.negative
    distance = np.maximum(
        rounding.ulps(magnitude[wrong], negative[wrong], expected[wrong], expected_negative[wrong]), 1
    )
    tally.count(distance)
    for k, far in zip(wrong[:FIRST], distance[:FIRST], strict=True):
        shown = grid.show(int(magnitude[k]), bool(negative[k]))
        wanted = grid.show(int(expected[k]), bool(expected_negative[k]))
        tally.first.append(
            Wrong(block.start + int(these.rows[k]), int(these.cols[k]), shown, wanted, int(far))
        )
    source, x, size = these.source[wrong], these.x[wrong], these.size[wrong]
    _explain(tally, grid, magnitude[wrong], negative[wrong], source, x, size)


def _explain(
    tally: Tally,
    grid: Grid,
    magnitude: Ints,
    negative: Mask,
    source: Floats,
    x: Floats,
    size: Floats,
) -> None:
    """What a person wants to know of wrong elements: still the base's? the update, times what?"""
    nothing = np.zeros_like(source)
    base = rounding.judge_rounding(grid, magnitude, negative, source, nothing, np.signbit(source))
    tally.stale = int(base.right.sum())
    stored = np.where(negative, -1.0, 1.0) * grid.value(np.minimum(magnitude, grid.infinity))
    update = x - source
    tally.near = int((np.abs(stored - x) <= size * 2.0 ** (1 - grid.fraction_bits)).sum())
    with np.errstate(all="ignore"):
        moved, wanted = float(((stored - source) * update).sum()), float((update * update).sum())
    if np.isfinite(moved) and np.isfinite(wanted):
        tally.moved, tally.wanted = moved, wanted
