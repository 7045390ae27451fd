"""Is a stored number the correctly rounded value of a real number? Answered by intervals, never by rounding.

A floating-point number m is right for a real x exactly when x lies between the midpoints to m's neighbours;
a midpoint itself belongs to the neighbour with the even significand (IEEE 754-2019, 4.3.1). Midpoints of
bfloat16, float16 and float32 are exact in float64, so no step of this test rounds anything.

With another share t than one half the same is said of a dithered number: its boundaries lie at t of the way
to the neighbour beyond, and belong to the number below them.

Zeros: a real number that is not zero keeps its sign when it rounds to zero. Zero itself has none, so +0 is
right for it, and -0 where the base stored -0 there, because adding nothing to a number may leave it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """The numbers of one floating-point format, counted upwards from zero by `magnitude`."""

    name: str
    """Its name in a safetensors header."""
    dtype: torch.dtype
    stored_as: torch.dtype
    """The integer type of the same width."""
    fraction_bits: int
    bias: int

    @property
    def sign(self) -> int:
        """Where the sign bit is, counted from zero."""
        return self.stored_as.itemsize * 8 - 1

    @property
    def infinity(self) -> int:
        """The magnitude of infinity; greater ones are NaN."""
        return (2 * self.bias + 1) << self.fraction_bits

    def magnitudes(self, stored: torch.Tensor) -> tuple[Ints, Mask]:
        """Magnitudes and signs (True for minus) of stored values."""
        bits = stored.contiguous().view(self.stored_as).to(torch.int64).numpy()
        return bits & ((1 << self.sign) - 1), bits < 0

    def value(self, magnitude: Ints) -> Floats:
        """The numbers of these magnitudes; for infinity's, the power of two that would come next."""
        exponent, fraction = magnitude >> self.fraction_bits, magnitude & ((1 << self.fraction_bits) - 1)
        normal = ((exponent - self.bias + 1023) << 52) | (fraction << (52 - self.fraction_bits))
        subnormal = fraction * 2.0 ** (1 - self.bias - self.fraction_bits)
        return np.where(exponent == 0, subnormal, normal.view(np.float64))

    def one(self, magnitude: int) -> float:
        """`value` of a single magnitude."""
        exponent, fraction = magnitude >> self.fraction_bits, magnitude & ((1 << self.fraction_bits) - 1)
        significand = fraction + ((1 << self.fraction_bits) if exponent else 0)
        return math.ldexp(significand, max(exponent, 1) - self.bias - self.fraction_bits)

    def below(self, x: Floats) -> Ints:
        """The magnitude of the greatest number that is not greater than x ≥ 0, at most infinity's."""
        bits = x.view(np.int64) >> (52 - self.fraction_bits)
        normal = bits - ((1023 - self.bias) << self.fraction_bits)
        smallest_normal = 1 << self.fraction_bits
        subnormal = np.minimum(x * 2.0 ** (self.bias + self.fraction_bits - 1), smallest_normal)
        magnitude = np.where(normal >= smallest_normal, normal, subnormal.astype(np.int64))
        return np.minimum(magnitude, self.infinity)

    def midpoint(self, magnitude: Ints) -> Floats:
        """Halfway between a magnitude's number and the next."""
        return (self.value(magnitude) + self.value(magnitude + 1)) / 2

    def boundary(self, magnitude: Ints, share: Floats | None) -> Floats:
        """Between a magnitude's number and the next, at a share of the way; in the middle without one."""
        if share is None:
            return self.midpoint(magnitude)
        here = self.value(magnitude)
        return here + share * (self.value(magnitude + 1) - here)

    def half_steps(self, magnitude: Ints) -> tuple[Floats, Floats]:
        """Distance to the midpoint below and above, for finite magnitudes from 1 on."""
        exponent = magnitude >> self.fraction_bits
        up = ((np.maximum(exponent, 1) - self.bias - self.fraction_bits - 1 + 1023) << 52).view(np.float64)
        edge = (exponent > 1) & ((magnitude & ((1 << self.fraction_bits) - 1)) == 0)
        return np.where(edge, up / 2, up), up

    def show(self, magnitude: int, negative: bool) -> float | str:
        """For a record, which holds finite numbers only."""
        if magnitude > self.infinity:
            return "nan"
        if magnitude == self.infinity:
            return "-inf" if negative else "inf"
        value = self.one(magnitude)
        return -value if negative else value


GRIDS = {
    "BF16": Grid("BF16", torch.bfloat16, torch.int16, 7, 127),
    "F16": Grid("F16", torch.float16, torch.int16, 10, 15),
    "F32": Grid("F32", torch.float32, torch.int32, 23, 127),
}


@dataclass(frozen=True)
class Verdict:
    """What is known of each of a list of elements: certainly right, certainly wrong, or (neither) open."""

    right: Mask
    wrong: Mask

    @property
    def open(self) -> Mask:
        """Where the error bound reaches over a midpoint."""
        return ~(self.right | self.wrong)


def judge_rounding(
    grid: Grid,
    magnitude: Ints,
    negative: Mask,
    x: Floats,
    error: Floats,
    base_sign: Mask,
    share: Floats | None = None,
) -> Verdict:
    """Whether stored numbers are right for real ones within `error` of x (0 where x is exact).

    `base_sign` is the sign bit of what the base holds there; it counts only where the real value is zero.
    `share` is given for dithered numbers.
    """
    finite = (magnitude < grid.infinity) & np.isfinite(x) & np.isfinite(error)
    inside_grid = np.where(finite, magnitude, 0)
    y = np.where(finite, np.where(negative, -x, x), 0.0)
    # y ± error is itself rounded: one unit in the last place of either more than covers it.
    slack = np.where(error > 0, error * (1 + 2.0**-50) + np.abs(y) * 2.0**-52, 0.0)
    high = grid.boundary(inside_grid, share)
    low = np.where(inside_grid > 0, grid.boundary(np.maximum(inside_grid - 1, 0), share), 0.0)
    even = (inside_grid & 1) == 0
    if share is None:
        tie = (error == 0) & even & ((y == high) | ((y == low) & (inside_grid > 0)))
    else:
        tie = (error == 0) & (y == high)
    right = ((y - slack > low) & (y + slack < high)) | tie
    wrong = (y + slack < low) | (y - slack > high) | ((error == 0) & ~right)
    zero = (error == 0) & (x == 0) & (inside_grid == 0)
    right = np.where(zero, ~negative | base_sign, right)
    wrong = np.where(zero, negative & ~base_sign, wrong)
    # What is stored as infinity or NaN is never right; where x itself could not be computed, it is open.
    stored_finite = magnitude < grid.infinity
    return Verdict(right & finite, (wrong & finite) | ~stored_finite)


def nearest(grid: Grid, x: Floats, base_sign: Mask, share: Floats | None = None) -> tuple[Ints, Mask]:
    """Magnitudes and signs of the numbers nearest to x, or right for a share, x taken as exact."""
    size = np.abs(x)
    below = grid.below(size)
    middle = grid.boundary(np.minimum(below, grid.infinity - 1), share)
    up = size > middle
    if share is None:
        up |= (size == middle) & ((below & 1) == 1)
    magnitude = np.where(below < grid.infinity, below + up, below)
    return magnitude, np.where(x == 0, base_sign, x < 0)


def ulps(magnitude: Ints, negative: Mask, expected: Ints, expected_negative: Mask) -> Ints:
    """How many stored numbers lie between two, the second included; +0 and -0 count as two numbers."""
    stored = np.where(negative, -magnitude - 1, magnitude)
    wanted = np.where(expected_negative, -expected - 1, expected)
    return np.abs(stored - wanted)


def exact_nearest(
    grid: Grid, x: Fraction, base_sign: bool, guess: int = 0, share: Fraction | None = None
) -> tuple[int, bool]:
    """Magnitude and sign of the number nearest to a rational number, ties to even; or right for a share."""
    if x == 0:
        return 0, base_sign
    size = abs(x)
    return nearest_magnitude(grid, lambda other: (size > other) - (size < other), guess, share), x < 0


def nearest_magnitude(
    grid: Grid, compare: Callable[[Fraction], int], guess: int = 0, share: Fraction | None = None
) -> int:
    """The magnitude nearest to a positive number that is known by comparison alone, ties to even.

    With a share: the magnitude that is right for it.

    `compare(y)` is the sign of the number less y: enough for irrational numbers too. A `guess` that is right
    or next to right saves the search.
    """
    for near in (guess, guess + 1, guess - 1):
        if 0 <= near <= grid.infinity and _is_nearest(grid, compare, near, share):
            return near
    low, high = 0, grid.infinity
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if compare(Fraction(grid.one(middle))) >= 0 else (low, middle)
    return low if _is_nearest(grid, compare, low, share) else low + 1


def _is_nearest(
    grid: Grid, compare: Callable[[Fraction], int], magnitude: int, share: Fraction | None
) -> bool:
    """A boundary itself goes to the even number, with a share to the one below."""
    even = magnitude % 2 == 0
    if magnitude > 0:
        side = compare(_boundary(grid, magnitude - 1, share))
        if side < 0 or (side == 0 and (share is not None or not even)):
            return False
    if magnitude == grid.infinity:
        return True
    side = compare(_boundary(grid, magnitude, share))
    return side < 0 or (side == 0 and (share is not None or even))


def _boundary(grid: Grid, magnitude: int, share: Fraction | None) -> Fraction:
    below, above = Fraction(grid.one(magnitude)), Fraction(grid.one(magnitude + 1))
    return below + (above - below) * (Fraction(1, 2) if share is None else share)


def exact_dot(left: Any, right: Any) -> Fraction:
    """Σ left·right of two sequences of float64 numbers, as a rational number."""
    total, exponent = 0, 0
    for a, b in zip(left, right, strict=True):
        numerator_a, denominator_a = float(a).as_integer_ratio()
        numerator_b, denominator_b = float(b).as_integer_ratio()
        product = numerator_a * numerator_b
        shift = (denominator_a.bit_length() - 1) + (denominator_b.bit_length() - 1)
        if shift > exponent:
            total, exponent = (total << (shift - exponent)) + product, shift
        else:
            total += product << (exponent - shift)
    return Fraction(total, 1 << exponent)
