"""Rounding by definition, for tests: look up the two neighbours and take the nearer, ties to the even one.

Shares nothing with the package: 16-bit formats are listed whole, float32 goes by its neighbours.
"""

from __future__ import annotations

import bisect
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np


@cache
def _finite(dtype: str) -> tuple[list[Fraction], list[int]]:
    """All finite numbers of a 16-bit format in order, with their bit patterns (one zero)."""
    values = {}
    for pattern in range(1 << 16):
        raw = struct.pack("<H", pattern)
        number = struct.unpack("<e", raw)[0] if dtype == "F16" else struct.unpack("<f", b"\0\0" + raw)[0]
        if math.isfinite(number) and pattern != 0x8000:
            values[Fraction(number)] = pattern
    ordered = sorted(values)
    return ordered, [values[value] for value in ordered]


def nearest(value: Fraction, dtype: str) -> float:
    """The number of the format that is nearest to `value`; the one with an even last bit of two."""
    if dtype == "F32":
        return _nearest_single(value)
    ordered, patterns = _finite(dtype)
    place = bisect.bisect_left(ordered, value)
    if place < len(ordered) and ordered[place] == value:
        return float(value)
    assert 0 < place < len(ordered), "the reference is for values in range"
    below, above = ordered[place - 1], ordered[place]
    if value - below == above - value:
        return float(below if patterns[place - 1] % 2 == 0 else above)
    return float(below if value - below < above - value else above)


def _nearest_single(value: Fraction) -> float:
    start = np.float32(float(value))
    with np.errstate(over="ignore"):
        around = [np.nextafter(start, np.float32(side * np.inf), dtype=np.float32) for side in (-1, 1)]
    options = sorted(
        {float(option) for option in (start, *around) if np.isfinite(option)},
        key=lambda number: abs(Fraction(number) - value),
    )
    first, second = options[:2]
    if abs(Fraction(first) - value) == abs(Fraction(second) - value):
        return first if struct.unpack("<I", struct.pack("<f", first))[0] % 2 == 0 else second
    return first


def merged_value(
    weight: float, products: Sequence[tuple[float, float, Sequence[float], Sequence[float]]]
) -> Fraction:
    """W + Σ w·s·Σ L·R of one element, as a rational number; products are (s, w, row of L, column of R)."""
    total = Fraction(weight)
    for scale, share, left, right in products:
        dot = sum((Fraction(a) * Fraction(b) for a, b in zip(left, right, strict=True)), start=Fraction(0))
        total += Fraction(scale) * Fraction(share) * dot
    return total
