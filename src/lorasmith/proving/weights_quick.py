"""The quick test, for nearly all elements: certainly nearer to the stored number than half an ulp.

It computes the formula in float32 or float64, in steps whose working set stays in a core's cache, with a
bound on its own error. What it cannot accept it names; it never rejects. So it costs time, never an answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
import torch

from lorasmith.proving.weights_elements import candidates, still_doubtful
from lorasmith.proving.weights_gain import gamma
from lorasmith.proving.weights_rounding import Floats, Grid, Ints
from lorasmith.proving.weights_scratch import workspace
from lorasmith.proving.weights_terms import Block, prepare

_STEP_BYTES = 1 << 20
"""Size of each array of a step: a few of them stay in the cache that cores share."""
_ELEMENTS = 1 << 13
"""Looked at again together: their factors stay in a core's cache."""
_LEAST_SHARE = 2.0**-10
"""Of the row's bound, that is kept for every column: what may underflow is told by rows alone."""
_RANK_FOR_FLOAT32 = 64
"""Above it the bound of float32 leaves too much to the slow test."""


def quick_type(grid: Grid, rank: int, source: torch.dtype) -> torch.dtype:
    """The type of the quick test: float32 where its error is far below the grid's half ulp."""
    narrow = grid.fraction_bits <= 10 and rank <= _RANK_FOR_FLOAT32 and source != torch.float64
    return torch.float32 if narrow else torch.float64


@dataclass(frozen=True)
class Shares:
    """A bound on the error of a computed x − m: what it grows by with each of three sizes."""

    stored: float
    """Of |m|."""
    distance: float
    """Of the computed |x − m|."""
    reach: float
    """Of the bound on Σ|c·L|·|R|."""


def error_shares(block: Block, kind: torch.dtype) -> Shares:
    """The bound for the order of `_step`, with u half the distance from 1 to the next number of `kind`.

    Without a gain it is (S − m) + Σ c·L·R in sums of any order, as many as products: S − m was rounded once
    before, a product in itself, its R and its c·L twice. |m| has no share, though it is most of what there
    is: |S − m| ≤ |x − m| + reach.
    With a gain it is (S + Σ c·L·R)·g − m, where everything counts: |S·g| ≤ |m| + |x − m| + reach.
    """
    unit = torch.finfo(kind).eps / 2
    rank = sum(term.right.shape[0] for term in block.terms)
    if block.gain:
        all_ = gamma(rank + 6, unit) + block.gain.error
        shares = Shares(all_, all_, 2 * all_)
    else:
        shares = Shares(0.0, gamma(rank + 1, unit), gamma(rank + 1, unit) + gamma(rank + 4, unit))
    if shares.distance >= 1:
        return Shares(math.inf, math.inf, math.inf)
    # The true distance, which all this speaks of, is the computed one and the error at most.
    return Shares(*(share / (1 - shares.distance) for share in astuple(shares)))


def doubtful(block: Block) -> Ints:
    """Flat positions, ascending, of the elements of the block that are not certainly right."""
    rows, columns = block.found.shape
    rank = sum(term.right.shape[0] for term in block.terms)
    kind = torch.float64 if block.gain else quick_type(block.grid, rank, block.source.dtype)
    shares = error_shares(block, kind)
    if not math.isfinite(shares.reach):
        return np.arange(rows * columns)
    lefts, reach = prepare(block.terms, block.start, rows, kind)
    if block.gain:
        gain = block.gain.values.abs()
        # With a gain per column the largest bounds them all.
        reach = reach * (gain if block.gain.per_row else gain.max())
    # |x − m| and the error lie within half an ulp, and |m| is at most twice the power of two before it: what
    # grows with the two goes into the factor of that power. What may underflow adds the smallest numbers.
    half_ulp = 2.0 ** -(block.grid.fraction_bits + 1)
    factor = max((half_ulp - 2 * shares.stored) / (1 + shares.distance) * (1 - 2.0**-20), 0.0)
    tiny = (rank + 1) * 4 * torch.finfo(kind).smallest_normal
    # A copy made for float32 has lost what float64 is to tell, where factors are stored in float64.
    rights = [
        term.right_quick if term.right_quick.dtype == kind else term.right.to(kind) for term in block.terms
    ]
    across = _across(block)
    least = (across.clamp(min=_LEAST_SHARE) * (1 + 2.0**-20)).to(kind)
    offset = -(shares.reach * reach[:, 0] + tiny / _LEAST_SHARE).to(kind)
    # Infinities and NaNs, which some buffers hold, compare false; that is all that is asked of them.
    with np.errstate(invalid="ignore", over="ignore"):
        left = _join(_FirstLook(block, lefts, rights, factor, offset, least).steps())
        kept = [left.positions[:0]]
        for start in range(0, len(left.positions), _ELEMENTS):
            some = left.only(slice(start, start + _ELEMENTS))
            kept.append(_look_again(block, some, reach[:, 0].numpy(), across.numpy(), shares, tiny))
    return np.concatenate(kept)


def _across(block: Block) -> torch.Tensor:
    """[columns] float64: the share of the row's bound on Σ|c·L|·|R| that holds for a column.

    With one term the norms of R's columns tell, which differ; else the largest has to do for all.
    """
    if len(block.terms) == 1 and not block.gain:
        term = block.terms[0]
        return term.right_norms / (term.right_norm or 1.0)
    return torch.ones(block.found.shape[1], dtype=torch.float64)


class _Left(NamedTuple):
    """What a step leaves open, taken while it is in the cache; all [n]."""

    positions: Ints
    """Flat, in the block."""
    beyond: Floats
    """The computed x − m."""
    source: torch.Tensor
    stored: torch.Tensor

    def only(self, part: slice) -> _Left:
        """Those of a part."""
        return _Left(self.positions[part], self.beyond[part], self.source[part], self.stored[part])


def _join(steps: Iterable[_Left]) -> _Left:
    positions, beyond, source, stored = zip(*steps, strict=True)
    return _Left(np.concatenate(positions), np.concatenate(beyond), torch.cat(source), torch.cat(stored))


@dataclass(frozen=True)
class _FirstLook:
    """At the elements of a block, some rows at a time: |x − m| < factor · power before |m| + offset · across.

    The power of two at or below the number before |m| decides how far the interval reaches towards zero,
    where it is narrowest.
    """

    block: Block
    lefts: list[torch.Tensor]
    rights: list[torch.Tensor]
    factor: float
    offset: torch.Tensor
    """[rows]"""
    across: torch.Tensor
    """[columns]"""

    def steps(self) -> Iterator[_Left]:
        """What is left of each step; the steps are small enough for the cache."""
        rows, columns = self.block.found.shape
        source, stored = self.block.source.reshape(-1), self.block.found.reshape(-1)
        step = max(1, _STEP_BYTES // self.offset.itemsize // columns)
        for start in range(0, rows, step):
            rest, beyond = self._step(start, min(start + step, rows))
            positions = rest + start * columns
            at = torch.from_numpy(positions)
            yield _Left(positions, beyond, source.index_select(0, at), stored.index_select(0, at))

    def _step(self, start: int, end: int) -> tuple[Ints, Floats]:
        """Flat positions in the step of what is not accepted, and x − m there.

        Few calls with as little between them as can be: threads need Python's lock from one to the next.
        """
        block, gain = self.block, self.block.gain
        x, power, numbers = workspace(self.offset.dtype, block.source[start:end].shape)
        x.copy_(block.source[start:end])
        power.copy_(block.found[start:end])
        if not gain:
            np.subtract(numbers.x, numbers.power, out=numbers.x)
        for left, right in zip(self.lefts, self.rights, strict=True):
            x.addmm_(left[start:end], right)
        if gain:
            x.mul_(gain.values[start:end] if gain.per_row else gain.values).sub_(power)
        np.absolute(numbers.x, out=numbers.distance)
        # A little less than a power of two is below it, and what is above one stays so.
        np.multiply(numbers.power, 1 - 2.0 ** -(block.grid.fraction_bits + 1), out=numbers.power)
        np.bitwise_and(numbers.power_bits, numbers.exponent, out=numbers.power_bits)
        power.addr_(self.offset[start:end], self.across, beta=self.factor)
        # A NaN compares false and stays doubtful.
        np.less(numbers.distance, numbers.power, out=numbers.mask)
        rest = np.flatnonzero(np.logical_not(numbers.mask, out=numbers.mask))
        return rest, numbers.x.take(rest).astype(np.float64)


def _look_again(
    block: Block, some: _Left, reach: Floats, across: Floats, shares: Shares, tiny: float
) -> Ints:
    """Positions still doubtful when both ends of each one's own interval are looked at, then in float64.

    Powers of two, whose interval is wider on the far side, are much of what the first look leaves.
    """
    chosen, beyond = candidates(block, some.positions, some.source, some.stored), some.beyond
    reach = reach.take(chosen.rows) * across.take(chosen.cols)
    # |m| is less than half a step times 2 to the width of the significand and one.
    size = chosen.up * 2.0 ** (block.grid.fraction_bits + 2)
    error = shares.stored * size + shares.distance * np.abs(beyond) + shares.reach * reach
    left = chosen.open(beyond, (1 + 2.0**-20) * (error + tiny))
    return still_doubtful(block, chosen.only(left)) if len(left) else chosen.positions[left]
