"""The formula at single elements, in float64 with a bound: for what a look at whole rows leaves open."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from lorasmith.proving.weights_gain import UNIT, gamma
from lorasmith.proving.weights_rounding import Floats, Ints
from lorasmith.proving.weights_terms import Block


def element_values(block: Block, source: Floats, rows: Ints, cols: Ints) -> tuple[Floats, Floats, Floats]:
    """x, a bound on its error, and a bound on Σ|summands|, each [n], where the base holds `source`."""
    x, reach, rank = source.copy(), np.zeros(len(source)), 0
    for term in block.terms:
        # NumPy's `take` is several times as fast as torch's indexing.
        left = term.left_rows(block.start, len(block.found)).to(torch.float64)
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


@dataclass(frozen=True)
class Candidates:
    """Elements that are looked at one by one, and how far x may be from the stored number m; all [n]."""

    positions: Ints
    """Flat, in the block."""
    rows: Ints
    cols: Ints
    source: Floats
    stored: Floats
    down: Floats
    """Distance from |m| to the midpoint towards zero; 0 where nothing may be accepted: zeros, infinities."""
    up: Floats

    def only(self, chosen: Ints) -> Candidates:
        """Those at these places."""
        return Candidates(*(getattr(self, part.name).take(chosen) for part in fields(self)))

    def open(self, distance: Floats, error: Floats) -> Ints:
        """Places where x − m, known to an error, may lie outside the interval; a NaN is one of them."""
        beyond = np.where(self.stored < 0, -distance, distance)
        return np.flatnonzero(~((beyond + error < self.up) & (beyond - error > -self.down)))


def candidates(block: Block, positions: Ints, source: torch.Tensor, stored: torch.Tensor) -> Candidates:
    """The elements at these flat positions, with what base and merge store there."""
    grid, columns = block.grid, block.found.shape[1]
    rows = positions // columns
    magnitude, _ = grid.magnitudes(stored)
    known = (magnitude > 0) & (magnitude < grid.infinity)
    down, up = grid.half_steps(np.where(known, magnitude, 1))
    values = (source.to(torch.float64).numpy(), stored.to(torch.float64).numpy())
    return Candidates(positions, rows, positions - rows * columns, *values, down * known, up * known)


def still_doubtful(block: Block, chosen: Candidates) -> Ints:
    """Flat positions, in the same order, of those that float64 does not show to be right either."""
    x, error, _ = element_values(block, chosen.source, chosen.rows, chosen.cols)
    # One unit in the last place of x more, for the subtraction.
    return chosen.positions.take(chosen.open(x - chosen.stored, error + np.abs(x) * 2.0**-52))
