"""The quick test, for nearly all elements: certainly nearer to the stored number than half an ulp.

It computes the formula in float32 or float64, in steps whose working set stays in a core's cache, with a
bound on its own error. What it cannot accept it names; it never rejects. So it costs time, never an answer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from lorasmith.proving.weights.blocks import UNIT, RowBlock, gamma, prepare_block
from lorasmith.proving.weights.rounding import Floats, Grid, Ints


def element_values(block: RowBlock, source: Floats, rows: Ints, cols: Ints) -> tuple[Floats, Floats, Floats]:
    """x, a bound on its error, and a bound on Σ|summands|, each [n], where the base holds `source`."""
    x, reach, rank = source.copy(), np.zeros(len(source)), 0
    for term in block.terms:
        # NumPy's `take` is several times as fast as torch's indexing.
        left = term.left_rows(block.start, len(block.stored)).to(torch.float64)
        factor = float(term.factor)
        products = np.einsum("ij,ij->i", left.numpy().take(rows, axis=0), term.columns64.take(cols, axis=0))
        x += products * factor
        norms = torch.linalg.vector_norm(left, dim=1).numpy().take(rows) * term.right_norms.numpy().take(cols)
        reach += norms * (abs(factor) * (1 + 2.0**-40))
        rank += left.shape[1]
    size = np.abs(source) + reach
    # Each product is rounded twice and c once, the sums rank + number of terms times; all in one bound.
    bound = gamma(rank + len(block.terms) + 4, UNIT)
    # Where a row of L or a column of R is all zeros nothing is added, and nothing rounded.
    error = np.where(reach > 0, bound * size * (1 + 2.0**-40) + rank * 2.0**-1000, 0.0)
    if block.gain:
        values = block.gain.values.numpy()
        gain = values[rows, 0] if block.gain.per_row else values[0, cols]
        x, size = x * gain, size * np.abs(gain)
        # Where x is zero and exact it stays so; all else takes on the gain's own error.
        error = error * np.abs(gain) * (1 + 2.0**-40) + np.abs(x) * (block.gain.error + 4 * UNIT)
    return x, error, size


class Unsettled(NamedTuple):
    """Elements that a look at whole rows did not accept; all [n]."""

    positions: Ints
    """Flat positions in the block."""
    beyond: Floats
    """x − m as that look computed it, m being the number that the merge stores."""
    source: torch.Tensor
    """What the base stores there."""
    stored: torch.Tensor
    """What the merge stores there."""

    def part(self, chosen: slice) -> Unsettled:
        """Those of a part."""
        return Unsettled(
            self.positions[chosen], self.beyond[chosen], self.source[chosen], self.stored[chosen]
        )


def _join(steps: Iterable[Unsettled]) -> Unsettled:
    positions, beyond, source, stored = zip(*steps, strict=True)
    return Unsettled(np.concatenate(positions), np.concatenate(beyond), torch.cat(source), torch.cat(stored))


def settle(block: RowBlock, left: Unsettled, error: Floats) -> Ints:
    """Flat positions, in the same order, of those that are not shown to be right one by one either.

    Each has both ends of its own interval: powers of two, whose interval is wider on the far side, are much
    of what a look at whole rows leaves. If that look's x − m, known to `error`, does not settle it, float64
    may.
    """
    magnitude, _ = block.grid.magnitudes(left.stored)
    # Zeros and infinities have no interval here, so that none of them is accepted.
    known = (magnitude > 0) & (magnitude < block.grid.infinity)
    down, up = (half * known for half in block.grid.half_steps(np.where(known, magnitude, 1)))
    m = left.stored.to(torch.float64).numpy()
    rest = _outside(m, left.beyond, error, down, up)
    if not len(rest):
        return rest
    positions, m = left.positions.take(rest), m.take(rest)
    rows = positions // block.stored.shape[1]
    source = left.source.to(torch.float64).numpy().take(rest)
    x, error, _ = element_values(block, source, rows, positions - rows * block.stored.shape[1])
    # One unit in the last place of x more, for the subtraction.
    error = error + np.abs(x) * 2.0**-52
    return positions.take(_outside(m, x - m, error, down.take(rest), up.take(rest)))


def _outside(m: Floats, beyond: Floats, error: Floats, down: Floats, up: Floats) -> Ints:
    """Places where x − m, known to an error, may lie beyond a midpoint; a NaN is one of them."""
    away = np.where(m < 0, -beyond, beyond)
    return np.flatnonzero(~((away + error < up) & (away - error > -down)))


_EXPONENT = {torch.float32: 0xFF << 23, torch.float64: 0x7FF << 52}
"""The bits of a number that hold its power of two."""

_local = threading.local()


@dataclass(frozen=True)
class Numbers:
    """The working memory as NumPy sees it, whose operations cost less to call; flat."""

    x: Any
    power: Any
    power_bits: Any
    """`power` as integers."""
    exponent: Any
    """One integer: the bits of the power of two."""
    distance: Any
    mask: Any


def workspace(kind: torch.dtype, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor, Numbers]:
    """Two matrices of a shape and what goes with them: this thread's, overwritten at its next call."""
    # Fresh pages for every step would cost more than the arithmetic.
    held = _local.__dict__.setdefault("held", {})
    memory, views = held.get(kind, (None, {}))
    if memory is None or memory.shape[1] < shape.numel():
        memory, views = torch.empty(4, shape.numel(), dtype=kind), {}
        held[kind] = memory, views
    if shape not in views:
        views[shape] = _view(memory, shape)
    return views[shape]


def _view(memory: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor, Numbers]:
    x, power, distance, mask = (part[: shape.numel()] for part in memory)
    integer = {torch.float32: np.int32, torch.float64: np.int64}[memory.dtype]
    bits = power.numpy().view(integer)
    truth = mask.view(torch.bool)[: shape.numel()].numpy()
    exponent = integer(_EXPONENT[memory.dtype])
    numbers = Numbers(x.numpy(), power.numpy(), bits, exponent, distance.numpy(), truth)
    return x.view(shape), power.view(shape), numbers


_STEP_BYTES = 1 << 20
"""Size of each array of a step: a few of them stay in the cache that cores share."""
_ELEMENTS = 1 << 13
"""Looked at again together: their factors stay in a core's cache."""
_LEAST_SHARE = 2.0**-10
"""Least share of the row's bound that is kept for a column: what may underflow is told by rows alone."""
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
    """Growth with |m|."""
    distance: float
    """Growth with the computed |x − m|."""
    reach: float
    """Growth with the bound on Σ|c·L|·|R|."""


def error_shares(block: RowBlock, kind: torch.dtype) -> Shares:
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


def doubtful(block: RowBlock) -> Ints:
    """Flat positions, ascending, of the elements of the block that are not certainly right."""
    rows, columns = block.stored.shape
    rank = sum(term.right.shape[0] for term in block.terms)
    kind = torch.float64 if block.gain else quick_type(block.grid, rank, block.source.dtype)
    shares = error_shares(block, kind)
    if not math.isfinite(shares.reach):
        return np.arange(rows * columns)
    lefts, reach = prepare_block(block.terms, block.start, rows, kind)
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
            some = left.part(slice(start, start + _ELEMENTS))
            row_reach = reach[:, 0].numpy().take(some.positions // columns)
            sizes = np.abs(some.stored.to(torch.float64).numpy()), np.abs(some.beyond)
            error = shares.stored * sizes[0] + shares.distance * sizes[1]
            error += shares.reach * row_reach * across.numpy().take(some.positions % columns) + tiny
            kept.append(settle(block, some, error * (1 + 2.0**-20)))
    return np.concatenate(kept)


def _across(block: RowBlock) -> torch.Tensor:
    """[columns] float64: the share of the row's bound on Σ|c·L|·|R| that holds for a column.

    With one term the norms of R's columns tell, which differ; else the largest has to do for all.
    """
    if len(block.terms) == 1 and not block.gain:
        term = block.terms[0]
        return term.right_norms / (term.right_norm or 1.0)
    return torch.ones(block.stored.shape[1], dtype=torch.float64)


@dataclass(frozen=True)
class _FirstLook:
    """At the elements of a block, some rows at a time: |x − m| < factor · power before |m| + offset · across.

    The power of two at or below the number before |m| decides how far the interval reaches towards zero,
    where it is narrowest.
    """

    block: RowBlock
    lefts: list[torch.Tensor]
    rights: list[torch.Tensor]
    factor: float
    offset: torch.Tensor
    """[rows]"""
    across: torch.Tensor
    """[columns]"""

    def steps(self) -> Iterator[Unsettled]:
        """What is left of each step; the steps are small enough for the cache."""
        rows, columns = self.block.stored.shape
        source, stored = self.block.source.reshape(-1), self.block.stored.reshape(-1)
        step = max(1, _STEP_BYTES // self.offset.itemsize // columns)
        for start in range(0, rows, step):
            rest, beyond = self._step(start, min(start + step, rows))
            positions = rest + start * columns
            at = torch.from_numpy(positions)
            yield Unsettled(positions, beyond, source.index_select(0, at), stored.index_select(0, at))

    def _step(self, start: int, end: int) -> tuple[Ints, Floats]:
        """Flat positions in the step of what is not accepted, and x − m there.

        Few calls with as little between them as can be: threads need Python's lock from one to the next.
        """
        block, gain = self.block, self.block.gain
        x, power, numbers = workspace(self.offset.dtype, block.source[start:end].shape)
        x.copy_(block.source[start:end])
        power.copy_(block.stored[start:end])
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
