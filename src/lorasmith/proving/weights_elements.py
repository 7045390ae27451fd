"""The formula at single elements, in float64 with a bound: for what a look at whole rows leaves open."""

from __future__ import annotations

import numpy as np
import torch

from lorasmith.proving.weights_gain import UNIT, gamma
from lorasmith.proving.weights_rounding import Floats, Ints
from lorasmith.proving.weights_terms import Block

_ELEMENTS = 1 << 13
"""Looked at together: their factors stay in a core's cache."""


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


def still_doubtful(block: Block, positions: Ints) -> Ints:
    """Of these flat positions, ascending, those that float64 does not show to be right either."""
    parts = [positions[start : start + _ELEMENTS] for start in range(0, len(positions), _ELEMENTS)]
    return np.concatenate([_still_doubtful(block, part) for part in parts]) if parts else positions


def _still_doubtful(block: Block, flat: Ints) -> Ints:
    rows, cols = np.divmod(flat, block.found.shape[1])
    at = torch.from_numpy(flat)
    magnitude, negative = block.grid.magnitudes(block.found.reshape(-1).index_select(0, at))
    source = block.source.reshape(-1).index_select(0, at).to(torch.float64).numpy()
    x, error, _ = element_values(block, source, rows, cols)
    known = (magnitude > 0) & (magnitude < block.grid.infinity)
    inside = np.where(known, magnitude, 1)
    down, up = block.grid.half_steps(inside)
    beyond = np.where(negative, -x, x) - block.grid.value(inside)
    # One unit in the last place of x more, for the subtraction. A NaN compares false and stays doubtful.
    error = error + np.abs(x) * 2.0**-52
    return flat[~(known & (beyond + error < up) & (beyond - error > -down))]
