"""Exact values of single elements: sums of floats without error, rationals where even those leave doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from lorasmith.merging.numbers.dither import BITS, Thresholds, dither_expansion
from lorasmith.merging.numbers.rounding import Array, FloatFormat, round_expansion

# Rational numbers onto a target's grid, to nearest or by a dither threshold, in integer arithmetic.


def round_rational(value: Fraction, target: FloatFormat) -> tuple[float, bool]:
    """RN of a rational number, and whether it lay halfway between two numbers of the grid."""
    scaled, quantum = _in_steps(value, target)
    return _signed(round(scaled) * quantum, value, target), scaled.denominator == 2  # halves go to even


def dither_rational(value: Fraction, threshold: int, target: FloatFormat) -> tuple[float, bool]:
    """A rational number dithered by its threshold, and whether it is its own threshold."""
    scaled, quantum = _in_steps(value, target)
    below = scaled.numerator // scaled.denominator
    beyond = scaled - below - Fraction(threshold, 1 << BITS)
    return _signed((below + (beyond > 0)) * quantum, value, target), beyond == 0


def _in_steps(value: Fraction, target: FloatFormat) -> tuple[Fraction, Fraction]:
    """|value| in steps of the grid where it lies, and the step."""
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, target.emin) - (target.precision - 1))
    return size / quantum, quantum


def _signed(size: Fraction, value: Fraction, target: FloatFormat) -> float:
    number = float("inf") if size > Fraction(target.largest) else float(size)
    return -number if value < 0 else number


Bools = npt.NDArray[np.bool_]
_PASSES = 6
_CHUNK = 4096


@dataclass(frozen=True)
class ExactTerm:
    """The numbers of one product w·s·Σₖ L[k]·R[k] for n elements."""

    scale: float
    weight: float
    left: Array
    """[n, K], as stored."""
    right: Array
    """[n, K]."""


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b as rounded sum and its error, without loss (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a · b as rounded product and its error, without loss (Dekker, with Veltkamp's splitting)."""
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(a: Array) -> tuple[Array, Array]:
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def expand(base: Array, terms: Sequence[ExactTerm]) -> Array:
    """Floats [n, m] whose exact sum over the last axis is W + Σ w·s·L·R."""
    parts = [base[:, None]]
    for term in terms:
        factors = [two_product(term.left, term.right)]
        for number in (term.scale, term.weight):
            if number != 1.0:
                constants = np.full((1, 1), number)
                factors = [two_product(piece, constants) for pair in factors for piece in pair]
        parts += [piece for pair in factors for piece in pair]
    return np.concatenate(parts, axis=1)


def distil(parts: Array) -> tuple[Array, Array, Bools]:
    """high + low equal to the sum of `parts` [n, m], |low| ≤ ½ ulp(high); and for which rows it is exact.

    Each pass replaces neighbours by their sum and its error, which loses nothing and drives all of the value
    into the last place and the error terms out to zero (Ogita, Rump and Oishi 2005, VecSum).
    """
    parts = parts.copy()
    count = parts.shape[1]
    if count == 1:
        zero = np.zeros(len(parts))
        return parts[:, 0], zero, np.ones(len(parts), dtype=bool)
    # Small magnitudes first: then few passes suffice.
    parts = np.take_along_axis(parts, np.argsort(np.abs(parts), axis=1), axis=1)
    for _ in range(_PASSES):
        for place in range(1, count):
            parts[:, place], parts[:, place - 1] = two_sum(parts[:, place], parts[:, place - 1])
        if not parts[:, : count - 2].any():
            break
    high, low = two_sum(parts[:, -1], parts[:, -2])
    certain: Bools = ~np.any(parts[:, : count - 2] != 0, axis=1)
    return high, low, certain


def round_exactly(
    base: Array, terms: Sequence[ExactTerm], target: FloatFormat, thresholds: Thresholds | None = None
) -> tuple[Array, Bools, Bools]:
    """RN of W + Σ w·s·L·R for n elements; which of them are ties, and which are exactly zero.

    With `thresholds` dithered instead of RN, a tie then being an element at its own threshold.
    """
    rounded = np.empty(len(base))
    ties = np.zeros(len(base), dtype=bool)
    zeros = np.zeros(len(base), dtype=bool)
    for start in range(0, len(base), _CHUNK):
        here = slice(start, start + _CHUNK)
        cut = [ExactTerm(term.scale, term.weight, term.left[here], term.right[here]) for term in terms]
        high, low, certain = distil(expand(base[here], cut))
        if thresholds is None:
            rounded[here], ties[here] = round_expansion(high, low, target)
        else:
            rounded[here], ties[here] = dither_expansion(high, low, thresholds[here], target)
        zeros[here] = (high == 0) & certain
        rounded[here] = np.where(zeros[here], 0.0, rounded[here])  # zero has no sign of its own: +0
        for index in np.nonzero(~certain)[0]:
            value = Fraction(float(base[here][index])) + sum(
                (_dot(term, int(index)) for term in cut), start=Fraction(0)
            )
            number, tie = _round_one(value, target, thresholds, start + int(index))
            rounded[start + index], ties[start + index], zeros[start + index] = number, tie, value == 0
    return rounded, ties, zeros


def _round_one(
    value: Fraction, target: FloatFormat, thresholds: Thresholds | None, place: int
) -> tuple[float, bool]:
    if thresholds is None:
        return round_rational(value, target)
    return dither_rational(value, int(thresholds[place]), target)


def exact_values(base: Array, terms: Sequence[ExactTerm]) -> list[Fraction]:
    """W + Σ w·s·L·R of n elements as rational numbers."""
    values: list[Fraction] = []
    for start in range(0, len(base), _CHUNK):
        here = slice(start, start + _CHUNK)
        cut = [ExactTerm(term.scale, term.weight, term.left[here], term.right[here]) for term in terms]
        high, low, certain = distil(expand(base[here], cut))
        for index in range(len(high)):
            if certain[index]:
                values.append(Fraction(float(high[index])) + Fraction(float(low[index])))
            else:
                dots = (_dot(term, index) for term in cut)
                values.append(Fraction(float(base[here][index])) + sum(dots, start=Fraction(0)))
    return values


def sum_of_squares(values: Sequence[Fraction]) -> Fraction:
    """Σ v² exactly; the denominators are powers of two, so that one shift brings them together."""
    bits = max((value.denominator.bit_length() for value in values), default=1)
    total = sum((value.numerator << (bits - value.denominator.bit_length())) ** 2 for value in values)
    return Fraction(total, 1 << (2 * (bits - 1)))


def round_scaled(
    magnitude: float, value: Fraction, square: Fraction, target: FloatFormat, threshold: int | None = None
) -> tuple[float, bool]:
    """RN of m·v/√S, or dithered by a threshold, and whether it is a tie.

    x² = (m·v)²/S is rational. X = ⌊x·2ᵏ⌋ comes from an integer square root; with k = 400 every number of the
    target, every midpoint and every threshold is a multiple of 2⁻ᵏ, so that none lies strictly between
    X·2⁻ᵏ and (X + 1)·2⁻ᵏ, and x rounds as any number between them does.
    """
    factor = Fraction(magnitude) * value
    if factor == 0:
        return 0.0, False
    scaled = factor * factor / square * (1 << 800)
    root = math.isqrt(scaled.numerator // scaled.denominator)
    if root * root == scaled:
        size = Fraction(root, 1 << 400)
    else:
        size = Fraction(2 * root + 1, 1 << 401)
    signed = size if factor > 0 else -size
    return round_rational(signed, target) if threshold is None else dither_rational(signed, threshold, target)


def _dot(term: ExactTerm, index: int) -> Fraction:
    products = (
        Fraction(float(left)) * Fraction(float(right))
        for left, right in zip(term.left[index], term.right[index], strict=True)
    )
    return Fraction(term.scale) * Fraction(term.weight) * sum(products, start=Fraction(0))
