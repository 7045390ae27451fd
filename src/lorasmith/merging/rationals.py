"""Rational numbers onto a target's grid, to nearest or by a dither threshold, in integer arithmetic."""

from __future__ import annotations

from fractions import Fraction

from lorasmith.merging.dither import BITS
from lorasmith.merging.rounding import Target


def round_rational(value: Fraction, target: Target) -> tuple[float, bool]:
    """RN of a rational number, and whether it lay halfway between two numbers of the grid."""
    scaled, quantum = _in_steps(value, target)
    return _signed(round(scaled) * quantum, value, target), scaled.denominator == 2  # halves go to even


def dither_rational(value: Fraction, threshold: int, target: Target) -> tuple[float, bool]:
    """A rational number dithered by its threshold, and whether it is its own threshold."""
    scaled, quantum = _in_steps(value, target)
    below = scaled.numerator // scaled.denominator
    beyond = scaled - below - Fraction(threshold, 1 << BITS)
    return _signed((below + (beyond > 0)) * quantum, value, target), beyond == 0


def _in_steps(value: Fraction, target: Target) -> tuple[Fraction, Fraction]:
    """|value| in steps of the grid where it lies, and the step."""
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, target.emin) - (target.precision - 1))
    return size / quantum, quantum


def _signed(size: Fraction, value: Fraction, target: Target) -> float:
    number = float("inf") if size > Fraction(target.largest) else float(size)
    return -number if value < 0 else number
