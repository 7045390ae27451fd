"""The quick test, for nearly all elements: certainly nearer to the stored number than half an ulp.

It computes the formula in float32 or float64, in steps whose working set stays in a core's cache, with a
bound on its own error. What it cannot accept it names; it never rejects. So it costs time, never an answer.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from lorasmith.proving.weights_elements import still_doubtful
from lorasmith.proving.weights_rounding import Floats, Grid, Ints, Mask
from lorasmith.proving.weights_terms import Block, prepare

_STEP_BYTES = 1 << 20
"""Size of each array of a step: a few of them stay in the cache that cores share."""
_LEAST_SHARE = 2.0**-10
"""Of the row's bound, that is kept for every column: what may underflow is told by rows alone."""
_RANK_FOR_FLOAT32 = 64
"""Above it the bound of float32 leaves too much to the slow test."""

_local = threading.local()


def quick_type(grid: Grid, rank: int, source: torch.dtype) -> torch.dtype:
    """The type of the quick test: float32 where its error is far below the grid's half ulp."""
    narrow = grid.fraction_bits <= 10 and rank <= _RANK_FOR_FLOAT32 and source != torch.float64
    return torch.float32 if narrow else torch.float64


def doubtful(block: Block) -> Ints:
    """Flat positions, ascending, of the elements of the block that are not certainly right."""
    rows, columns = block.found.shape
    rank = sum(term.right.shape[0] for term in block.terms)
    kind = torch.float64 if block.gain else quick_type(block.grid, rank, block.source.dtype)
    lefts, reach, bound = prepare(block.terms, block.start, rows, kind)
    if block.gain:
        gain = block.gain.values.abs()
        # With a gain per column the largest bounds them all.
        reach = reach * (gain if block.gain.per_row else gain.max())
        bound += block.gain.error
    # With d = |x − m|: |S| ≤ |m| + d + reach, so the error is at most bound·(|m| + d + 2·reach), and |m| is
    # at most twice the power of two before it. The share that grows with |m| goes to the coefficient of that
    # power, the share of d to the divisor; what may underflow adds the smallest numbers.
    half_ulp = 2.0 ** -(block.grid.fraction_bits + 1)
    coefficient = max((half_ulp - 4 * bound) / (1 + 2 * bound) * (1 - 2.0**-20), 0.0) if bound < 1 else 0.0
    tiny = (rank + 1) * 4 * torch.finfo(kind).smallest_normal
    across = _across(block)
    offset = -(2 * bound * reach[:, 0] + tiny / _LEAST_SHARE).to(kind)
    step = max(1, _STEP_BYTES // kind.itemsize // columns)
    found = [
        _step(block, start, min(start + step, rows), lefts, offset, across.to(kind), coefficient)
        for start in range(0, rows, step)
    ]
    positions = np.concatenate([part[0] for part in found])
    if not len(positions):
        return positions
    beyond = np.concatenate([part[1] for part in found])
    positions = _second_look(block, positions, beyond, reach[:, 0].numpy(), bound, tiny)
    return still_doubtful(block, positions)


def _across(block: Block) -> torch.Tensor:
    """[columns]: no less than the share of the row's bound on Σ|c·L|·|R| that holds for a column.

    With one term the norms of R's columns tell, which differ; else the largest has to do for all.
    """
    if len(block.terms) == 1 and not block.gain:
        term = block.terms[0]
        share = term.right_norms / (term.right_norm or 1.0)
    else:
        share = torch.ones(block.found.shape[1], dtype=torch.float64)
    return share.clamp(min=_LEAST_SHARE) * (1 + 2.0**-20)


def _step(
    block: Block,
    start: int,
    end: int,
    lefts: list[torch.Tensor],
    offset: torch.Tensor,
    across: torch.Tensor,
    coefficient: float,
) -> tuple[Ints, Floats]:
    """Flat positions in the block that a step does not accept, and x − m there."""
    grid, stored, kind = block.grid, block.found[start:end], offset.dtype
    x, work, before, mask = _scratch(kind, grid, stored.shape)
    x.copy_(block.source[start:end])
    for left, term in zip(lefts, block.terms, strict=True):
        x.addmm_(left[start:end], term.right_quick.to(kind))
    if block.gain:
        x.mul_(block.gain.values[start:end] if block.gain.per_row else block.gain.values)
    x.sub_(stored)
    torch.abs(x, out=work[0])
    _powers_before(grid, stored, before, work[1])
    work[1].addr_(offset[start:end], across, beta=coefficient)
    # NumPy's comparison is several times as fast as torch's; a NaN compares false and stays doubtful.
    np.less(work[0].view(-1).numpy(), work[1].view(-1).numpy(), out=mask)
    positions = np.flatnonzero(np.logical_not(mask, out=mask))
    beyond: Floats = x.view(-1).numpy().take(positions).astype(np.float64)
    return positions + start * stored.shape[1], beyond


def _powers_before(grid: Grid, stored: torch.Tensor, bits: torch.Tensor, out: torch.Tensor) -> None:
    """The power of two at or below the number before |stored|; 0 for zeros and subnormals.

    The number before it decides how far the interval reaches towards zero, where it is narrowest.
    """
    torch.bitwise_and(stored.view(grid.stored_as), (1 << grid.sign) - 1, out=bits)
    bits.sub_(1).clamp_(min=0).bitwise_and_(grid.infinity)
    out.copy_(bits.view(grid.dtype))


def _second_look(
    block: Block, positions: Ints, beyond: Floats, reach: Floats, bound: float, tiny: float
) -> Ints:
    """Positions still doubtful when both ends of each one's own interval are looked at.

    Powers of two, whose interval is wider on the far side, are much of what the first look leaves.
    """
    grid, columns = block.grid, block.found.shape[1]
    magnitude, negative = grid.magnitudes(
        block.found.reshape(-1).index_select(0, torch.from_numpy(positions))
    )
    known = (magnitude > 0) & (magnitude < grid.infinity)
    down, up = grid.half_steps(np.where(known, magnitude, 1))
    beyond = np.where(negative, -beyond, beyond)
    rows, cols = np.divmod(positions, columns)
    reach = reach[rows]
    if len(block.terms) == 1 and not block.gain:
        # One term: its columns tell more than the largest of them.
        term = block.terms[0]
        reach *= (term.right_norms.numpy() / (term.right_norm or 1.0))[cols]
    # |m| is less than half a step times 2 to the width of the significand and one.
    size = up * 2.0 ** (grid.fraction_bits + 2) + 2 * np.abs(beyond) + 2 * reach
    error = (1 + 2.0**-20) * (bound * size + tiny)
    return positions[~(known & (beyond + error < up) & (beyond - error > -down))]


def _scratch(
    kind: torch.dtype, grid: Grid, shape: torch.Size
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor, Mask]:
    """This thread's working memory: fresh pages for every step would cost more than the arithmetic."""
    held = _local.__dict__.setdefault("held", {})
    size = shape.numel()
    if (kind, grid.name) not in held or len(held[kind, grid.name][0]) < size:
        floats = [torch.empty(size, dtype=kind) for _ in range(3)]
        bits = torch.empty(size, dtype=grid.stored_as)
        held[kind, grid.name] = (*floats, bits, np.empty(size, np.bool_))
    x, one, two, bits = (part[:size].view(shape) for part in held[kind, grid.name][:4])
    return x, (one, two), bits, held[kind, grid.name][4][:size]
