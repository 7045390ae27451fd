"""What the quick test does not accept, judged one by one: by intervals in float64, or in rational numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from lorasmith.errors import CheckpointError
from lorasmith.proving import weights_rounding as rounding
from lorasmith.proving.weights_dither import Dither
from lorasmith.proving.weights_elements import element_values
from lorasmith.proving.weights_exact import decide, float64_is_exact
from lorasmith.proving.weights_rounding import Floats, Grid, Ints, Mask
from lorasmith.proving.weights_tally import FIRST, Tally, Wrong
from lorasmith.proving.weights_terms import Block


@dataclass(frozen=True)
class _Elements:
    """Some elements of a block; all [n]."""

    rows: Ints
    """Of the block."""
    cols: Ints
    magnitude: Ints
    negative: Mask
    source: Floats
    x: Floats
    error: Floats
    """A bound on that of x."""
    size: Floats
    """A bound on Σ|summands|."""
    share: Floats | None
    """Of a dithered merge."""

    def judge(self, grid: Grid) -> rounding.Verdict:
        """Whether what is stored is right, as far as x and its error tell."""
        sign = np.signbit(self.source)
        return rounding.judge(grid, self.magnitude, self.negative, self.x, self.error, sign, self.share)


def judge_elements(block: Block, flat: Ints, dither: Dither | None) -> Tally:
    """What is found at these flat positions of the block."""
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


def _read(block: Block, flat: Ints, dither: Dither | None) -> _Elements:
    rows, cols = np.divmod(flat, block.found.shape[1])
    at = torch.from_numpy(flat)
    magnitude, negative = block.grid.magnitudes(block.found.reshape(-1).index_select(0, at))
    source = block.source.reshape(-1).index_select(0, at).to(torch.float64).numpy()
    if block.terms and not np.isfinite(source).all():
        raise CheckpointError(f"the base's tensor {block.name!r} is not finite", expected="finite numbers")
    x, error, size = element_values(block, source, rows, cols)
    share = None if dither is None else dither.shares(block.start + rows, cols)
    return _Elements(rows, cols, magnitude, negative, source, x, error, size, share)


def _verdict(block: Block, these: _Elements, finite: Mask) -> rounding.Verdict:
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
    found = np.where(these.magnitude > grid.infinity, np.nan, infinite)
    same = (found == these.source) | (np.isnan(found) & np.isnan(these.source))
    kept: Mask = same & (these.magnitude >= grid.infinity)
    return kept


def _decide(block: Block, these: _Elements, k: int, guess: int) -> tuple[int, bool, bool]:
    """Magnitude and sign that are right in rational numbers, and whether they are what is stored."""
    share = None if these.share is None else Fraction(float(these.share[k]))
    place = int(these.rows[k]), int(these.cols[k])
    wanted, zero = decide(block, float(these.source[k]), *place, guess, share)
    found = int(these.magnitude[k]), bool(these.negative[k])
    right = found[0] < block.grid.infinity and ((zero and found == (0, False)) or found == wanted)
    return *wanted, right


def _enter(
    tally: Tally, block: Block, these: _Elements, wrong: Ints, expected: Ints, expected_negative: Mask
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
    base = rounding.judge(grid, magnitude, negative, source, nothing, np.signbit(source))
    tally.stale = int(base.right.sum())
    found = np.where(negative, -1.0, 1.0) * grid.value(np.minimum(magnitude, grid.infinity))
    update = x - source
    tally.near = int((np.abs(found - x) <= size * 2.0 ** (1 - grid.fraction_bits)).sum())
    with np.errstate(all="ignore"):
        moved, wanted = float(((found - source) * update).sum()), float((update * update).sum())
    if np.isfinite(moved) and np.isfinite(wanted):
        tally.moved, tally.wanted = moved, wanted
