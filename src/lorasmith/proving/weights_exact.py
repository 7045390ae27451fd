"""Elements that floating point leaves open: is float64 exact here after all, and if not, rational numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from lorasmith.proving import weights_rounding as rounding
from lorasmith.proving.weights_gain import Gain, make_gain, sum_of_squares
from lorasmith.proving.weights_rounding import Floats, Ints, Mask
from lorasmith.proving.weights_terms import Block, LoadedTerm, sums


def float64_is_exact(block: Block, source: Floats, size: Floats, rows: Ints, cols: Ints) -> Mask:
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
        left = term.left_rows(block.start, len(block.found))[torch.from_numpy(rows)].double().numpy()
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
    block: Block, source: float, row: int, col: int, guess: int, share: Fraction | None
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


def exact_element(block: Block, source: float, row: int, col: int) -> Fraction:
    """S + Σ c·L·R of one element as a rational number."""
    return exact_sum(block.terms, source, block.start + row, col)


def exact_sum(terms: Sequence[LoadedTerm], source: float, row: int, col: int) -> Fraction:
    """The same by the row of the whole matrix."""
    total = Fraction(source)
    for term in terms:
        left = term.left[row - term.first_row].tolist()
        total += term.factor * rounding.exact_dot(left, term.right[:, col].tolist())
    return total


def row_gain(block: Block, magnitudes: torch.Tensor) -> Gain:
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
