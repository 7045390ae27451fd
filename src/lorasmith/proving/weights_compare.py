"""Rows of a merged tensor against their formula: what the quick test does not accept is judged one by one.

It is computed again in float64 with a bound per element and judged by intervals, and where those touch a
midpoint, in rational numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch

from lorasmith.errors import CheckpointError
from lorasmith.proving import weights_rounding as rounding
from lorasmith.proving.weights_dither import Dither, doubtful_dithered, make_dither
from lorasmith.proving.weights_elements import element_values
from lorasmith.proving.weights_exact import decide, float64_is_exact, row_gain
from lorasmith.proving.weights_quick import doubtful
from lorasmith.proving.weights_rounding import Floats, Grid, Ints
from lorasmith.proving.weights_tally import FIRST, Tally, Wrong
from lorasmith.proving.weights_terms import Block

_SLOW_ELEMENTS = 1 << 13
"""Elements judged slowly at a time, so that memory stays small when all are wrong."""


def compare(block: Block) -> Tally:
    """Check every element of the block."""
    if block.magnitudes is not None:
        block = replace(block, gain=row_gain(block, block.magnitudes))
    tally = Tally(elements=block.found.numel())
    dither = _dither_of(block)
    open_ = doubtful(block) if dither is None else doubtful_dithered(block, dither)
    for start in range(0, len(open_), _SLOW_ELEMENTS):
        tally.add(_slow(block, open_[start : start + _SLOW_ELEMENTS], dither))
    return tally


def _dither_of(block: Block) -> Dither | None:
    """The stream of a dithered tensor; rows that nothing is added to are rounded to nearest all the same."""
    if block.seed is None or not (block.terms or block.gain):
        return None
    return make_dither(block.seed, block.name, block.found.shape[1])


def _slow(block: Block, flat: Ints, dither: Dither | None) -> Tally:
    """Judge the elements at these flat positions one by one."""
    grid, columns = block.grid, block.found.shape[1]
    rows, cols = np.divmod(flat, columns)
    at = torch.from_numpy(flat)
    magnitude, negative = grid.magnitudes(block.found.reshape(-1)[at])
    source = block.source.reshape(-1)[at].to(torch.float64).numpy()
    finite = np.isfinite(source)
    if block.terms and not finite.all():
        raise CheckpointError(f"the base's tensor {block.name!r} is not finite", expected="finite numbers")
    x, error, size = element_values(block, source, rows, cols)
    base_sign = np.signbit(source)
    share = None if dither is None else dither.shares(block.start + rows, cols)
    verdict = rounding.judge(grid, magnitude, negative, x, error, base_sign, share)
    expected, expected_negative = np.zeros_like(magnitude), np.zeros_like(negative)
    unsure = np.flatnonzero(~verdict.right)
    expected[unsure], expected_negative[unsure] = rounding.nearest(
        grid, np.nan_to_num(x[unsure]), base_sign[unsure], None if share is None else share[unsure]
    )
    right, open_ = verdict.right.copy(), np.flatnonzero(verdict.open)
    if len(open_):
        known = open_[float64_is_exact(block, source[open_], size[open_], rows[open_], cols[open_])]
        settled = rounding.judge(
            grid,
            magnitude[known],
            negative[known],
            x[known],
            np.zeros(len(known)),
            base_sign[known],
            None if share is None else share[known],
        )
        right[known] = settled.right
        open_ = np.setdiff1d(open_, known)
    if not finite.all():
        # Infinities and NaNs that a buffer holds on purpose stay what they are when its precision changes.
        found = np.where(magnitude > grid.infinity, np.nan, np.where(negative, -np.inf, np.inf))
        same = (found == source) | (np.isnan(found) & np.isnan(source))
        right[~finite] = (same & (magnitude >= grid.infinity))[~finite]
        open_ = open_[finite[open_]]
    # The distance of a wrong element is exact too where its neighbours' midpoint is out of the error's reach.
    for k in open_:
        place = int(rows[k]), int(cols[k])
        own = None if share is None else Fraction(float(share[k]))
        wanted, zero = decide(block, float(source[k]), *place, int(expected[k]), own)
        expected[k], expected_negative[k] = wanted
        free_zero = zero and magnitude[k] == 0 and not negative[k]
        stored_finite = magnitude[k] < grid.infinity
        right[k] = stored_finite and (free_zero or (int(magnitude[k]), bool(negative[k])) == wanted)
    tally = Tally(redone=len(open_))
    wrong = np.flatnonzero(~right)
    if len(wrong):
        distance = np.maximum(
            rounding.ulps(magnitude[wrong], negative[wrong], expected[wrong], expected_negative[wrong]), 1
        )
        tally.count(distance)
        for k, far in zip(wrong[:FIRST], distance[:FIRST], strict=True):
            shown = grid.show(int(magnitude[k]), bool(negative[k]))
            wanted_shown = grid.show(int(expected[k]), bool(expected_negative[k]))
            tally.first.append(Wrong(block.start + int(rows[k]), int(cols[k]), shown, wanted_shown, int(far)))
        _explain(tally, grid, magnitude[wrong], negative[wrong], source[wrong], x[wrong], size[wrong])
    return tally


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
    tally.count(np.maximum(_steps(found, source), 1))
    for k in range(min(FIRST, len(flat))):
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
