"""The quick test, for nearly all elements: certainly nearer to the stored number than half an ulp.

It computes the formula in float32 or float64, in steps whose working set stays in a core's cache, with a
bound on its own error. What it cannot accept it names; it never rejects. So it costs time, never an answer.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch

from lorasmith.proving.weights_rounding import Floats, Grid, Ints, Mask
from lorasmith.proving.weights_terms import Block, sums

_STEP_BYTES = 1 << 20
"""Size of each array of a step: a few of them stay in the cache that cores share."""
_RANK_FOR_FLOAT32 = 64
"""Above it the bound of float32 leaves too much to the slow test."""

_local = threading.local()


def quick_type(grid: Grid, rank: int, source: torch.dtype) -> torch.dtype:
    """The type of the quick test: float32 where its error is far below the grid's half ulp."""
    narrow = grid.fraction_bits <= 10 and rank <= _RANK_FOR_FLOAT32 and source != torch.float64
    return torch.float32 if narrow else torch.float64


@dataclass(frozen=True)
class _Left:
    """What a step leaves: flat positions in the block, and there x − m and the bound on the terms' row."""

    positions: Ints
    beyond: Floats
    reach: Floats
    bound: float


def doubtful(block: Block) -> Ints:
    """Flat positions, ascending, of the elements of the block that are not certainly right."""
    rows, columns = block.found.shape
    rank = sum(term.right.shape[0] for term in block.terms)
    kind = torch.float64 if block.gain else quick_type(block.grid, rank, block.source.dtype)
    step = max(1, _STEP_BYTES // kind.itemsize // columns)
    left = [_step(block, start, min(start + step, rows), kind, rank) for start in range(0, rows, step)]
    positions = np.concatenate([part.positions for part in left])
    if not len(positions):
        return positions
    return _second_look(
        block,
        positions,
        np.concatenate([part.beyond for part in left]),
        np.concatenate([part.reach for part in left]),
        max(part.bound for part in left),
    )


def _step(block: Block, start: int, end: int, kind: torch.dtype, rank: int) -> _Left:
    grid, stored = block.grid, block.found[start:end]
    x, work, before, mask = _scratch(kind, grid, stored.shape)
    x, reach, bound = sums(block.source[start:end], block.terms, block.start + start, kind, out=x)
    if block.gain:
        gain = block.gain.values[start:end] if block.gain.per_row else block.gain.values
        x.mul_(gain)
        # Per row: the largest gain of any column bounds them all.
        reach = reach * (gain.abs() if block.gain.per_row else gain.abs().max())
        bound += block.gain.error
    # With d = |x − m|: |S| ≤ |m| + d + reach, so the error is at most bound·(|m| + d + 2·reach), and |m| is
    # at most twice the power of two before it. The share that grows with |m| goes to the coefficient of that
    # power, the share of d to the divisor.
    half_ulp = 2.0 ** -(grid.fraction_bits + 1)
    coefficient = max((half_ulp - 4 * bound) / (1 + 2 * bound) * (1 - 2.0**-20), 0.0) if bound < 1 else 0.0
    offset = 2 * bound * reach + (rank + 1) * 4 * torch.finfo(kind).smallest_normal
    x.sub_(stored)
    torch.abs(x, out=work[0])
    _powers_before(grid, stored, before, work[1])
    torch.add(-offset.to(kind), work[1], alpha=coefficient, out=work[1])
    # NumPy's comparison is several times as fast as torch's; a NaN compares false and stays doubtful.
    np.less(work[0].numpy(), work[1].numpy(), out=mask)
    np.logical_not(mask, out=mask)
    at = torch.from_numpy(mask).view(-1).nonzero().view(-1)
    positions: Ints = at.numpy()
    beyond: Floats = x.view(-1)[at].to(torch.float64).numpy()
    rows = positions // stored.shape[1]
    return _Left(positions + start * stored.shape[1], beyond, reach[:, 0].numpy()[rows], bound)


def _powers_before(grid: Grid, stored: torch.Tensor, bits: torch.Tensor, out: torch.Tensor) -> None:
    """The power of two at or below the number before |stored|; 0 for zeros and subnormals.

    The number before it decides how far the interval reaches towards zero, where it is narrowest.
    """
    torch.bitwise_and(stored.view(grid.stored_as), (1 << grid.sign) - 1, out=bits)
    bits.sub_(1).clamp_(min=0).bitwise_and_(grid.infinity)
    out.copy_(bits.view(grid.dtype))


def _second_look(block: Block, positions: Ints, beyond: Floats, reach: Floats, bound: float) -> Ints:
    """Positions still doubtful when both ends of each one's own interval are looked at.

    Powers of two, whose interval is wider on the far side, are much of what the first look leaves.
    """
    grid = block.grid
    magnitude, negative = grid.magnitudes(block.found.reshape(-1)[torch.from_numpy(positions)])
    known = (magnitude > 0) & (magnitude < grid.infinity)
    magnitude = np.where(known, magnitude, 1)
    value = grid.value(magnitude)
    beyond = np.where(negative, -beyond, beyond)
    if len(block.terms) == 1 and not block.gain:
        # One term: its columns tell more than the largest of them.
        term = block.terms[0]
        reach = (
            reach * (term.right_norms.numpy() / (term.right_norm or 1.0))[positions % block.found.shape[1]]
        )
    tiny = 2.0**-110 if grid.fraction_bits <= 10 else 2.0**-1000
    error = (1 + 2.0**-20) * bound * (value + 2 * np.abs(beyond) + 2 * reach) + tiny
    inside = (beyond + error < grid.midpoint(magnitude) - value) & (
        beyond - error > grid.midpoint(magnitude - 1) - value
    )
    return positions[~(inside & known)]


def _scratch(
    kind: torch.dtype, grid: Grid, shape: torch.Size
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor, Mask]:
    """This thread's working memory: fresh pages for every step would cost more than the arithmetic."""
    held = _local.__dict__.setdefault("held", {})
    size = shape.numel()
    if held.get((kind, grid.name)) is None or len(held[kind, grid.name][0]) < size:
        floats = [torch.empty(size, dtype=kind) for _ in range(3)]
        held[kind, grid.name] = (*floats, torch.empty(size, dtype=grid.stored_as), np.empty(size, np.bool_))
    x, one, two, bits, mask = (part[:size] for part in held[kind, grid.name])
    return x.view(shape), (one.view(shape), two.view(shape)), bits.view(shape), mask.reshape(tuple(shape))
