"""Unbiased rounding: up with the probability of the fraction above the grid point below, from a fixed stream.

*The rule.* Let a ≤ |x| < b be neighbours on the target's grid and t the element's threshold. The result is b
(with x's sign) if |x| > a + t·(b − a), else a. t = (2n + 1)/2²⁵ for a uniform n of 24 bits, so that the mean
of the result is x to within 2⁻²⁵ of a step, no x is ever on two sides of a tie that n could reach but by
being a threshold itself, and x on the grid stays where it is. For one t the rule is monotone in x, as
rounding to nearest is (t = ½): all that is proved of candidates and bounds in rounding.py holds with
midpoints replaced by thresholds, which are float64 numbers for every target.

*The stream.* n of element i (counted row by row through the merged tensor) is the top 24 bits of the i-th
32-bit word, low half first, of Philox4x64-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) whose block for elements 8c … 8c + 7 has the counter c + 1 and whose key is the
first 16 bytes, little-endian, of SHA-256("lorasmith dither 1", seed, tensor name, joined by NUL). It is a
function of name, place and seed alone: no thread, block or shard can change it.

*Which elements are certain.* A float64 number has 53 − p bits beyond the target's p; compared as integers
with the threshold's, they decide. With |x̂ − x| ≤ ρ|x̂| + a and |x̂| ≥ 2³⁸·a the error is at most
r = 2⁵³ρ + 2¹⁵ units of x̂'s last place, and at most twice as many of x's, should a power of two lie between.
An element is left open within 4r of its threshold, counted around the cell so that a threshold next to a grid
point is seen from both of its sides; and where |x̂| is too small, too large or no number.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.merging.numbers.rounding import Array, Bound, FloatFormat, Indices
from lorasmith.merging.numbers.threads import Arrays

Thresholds = npt.NDArray[np.int64]
"""2n + 1 of each element, in units of 2⁻²⁵ of a step."""

BITS = 25
_DOMAIN = b"lorasmith dither 1"
_LARGEST_RHO = 2.0**-38
"""Above it the bound is too wide for the quick test, and every element is settled on its own."""


class ThresholdStream:
    """The thresholds of one tensor."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.sha256(b"\0".join((_DOMAIN, str(seed).encode(), name.encode()))).digest()
        self._key = int.from_bytes(digest[:16], "little")

    def take(self, first: int, count: int) -> Thresholds:
        """The thresholds of the elements `first` … `first + count`."""
        block, skipped = divmod(first, 8)
        words = np.random.Philox(key=self._key, counter=block).random_raw((skipped + count + 1) // 2)
        halves = np.empty((len(words), 2), dtype=np.int64)
        # 24 bits, doubled and made odd: bits 8 … 31 of each half of the word.
        halves[:, 0] = (words >> np.uint64(7)) & np.uint64(0x1FFFFFE)
        halves[:, 1] = (words >> np.uint64(39)) & np.uint64(0x1FFFFFE)
        halves |= 1
        return halves.reshape(-1)[skipped : skipped + count]


def open_dithered(
    candidate: torch.Tensor,
    bound: Bound,
    thresholds: Thresholds,
    target: FloatFormat,
    own: Arrays,
    out: torch.Tensor,
) -> Indices:
    """Round float64 candidates [m, n] into `out`; the flat positions that the error bound leaves open.

    What stands in `out` at an open position is of no use. Raises nothing: see `settle_dithered`.
    """
    if bound.relative > _LARGEST_RHO:
        out.copy_(candidate)
        return np.arange(candidate.numel())
    tail_bits = 53 - target.precision
    mask = (1 << tail_bits) - 1
    reach = 4 * (int(bound.relative * 2.0**53) + 2**15 + 1)
    bits = candidate.numpy().view(np.int64)
    tails, flags = own.longs, own.flags
    shifted = thresholds.reshape(bits.shape) << (tail_bits - BITS)
    np.subtract(bits, shifted, out=tails)
    tails += reach
    tails &= mask
    np.less_equal(tails, 2 * reach, out=flags)
    # Adding what the threshold lacks to a whole step carries over exactly where the tail is above it.
    np.subtract(mask, shifted, out=shifted)
    shifted += bits
    shifted &= ~mask
    out.copy_(torch.from_numpy(shifted.view(np.float64)))
    size = np.abs(candidate.numpy())
    limit = np.maximum(bound.absolute * (2.0**38 * (1 + 2.0**-20)), target.smallest_normal)
    # A number next to the smallest normal one could have been below it; NaN is not inside.
    inside = (size >= limit * (1 + 2.0**-20)) & (size < target.largest)
    np.logical_or(flags, ~inside, out=flags)
    return np.flatnonzero(flags)


def dither_reals(values: Array, thresholds: Thresholds, target: FloatFormat) -> Array:
    """Float64 numbers onto the target's grid, as float64; infinite beyond the target's largest number."""
    return dither_expansion(values, np.zeros_like(values), thresholds, target)[0]


def dither_expansion(
    high: Array, low: Array, thresholds: Thresholds, target: FloatFormat
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """The exact sums high + low, |low| ≤ ½ ulp(high), onto the grid; and which of them are thresholds.

    The distance of |high| from its threshold is zero or larger than |low|: both are multiples of units that
    |low| is below (high's last place, or the threshold's last bit).
    """
    size, rest = np.abs(high), np.copysign(1.0, high) * low
    _, exponent = np.frexp(size)
    quantum = np.maximum(exponent - 1, target.emin) - (target.precision - 1)
    scaled = np.ldexp(size, -quantum)
    below = np.floor(scaled)
    beyond = (scaled - below) - thresholds * 2.0**-BITS
    up = (beyond > 0) | ((beyond == 0) & (rest > 0))
    with np.errstate(over="ignore"):
        rounded = np.ldexp(below + up, quantum)
    rounded = np.where(rounded > target.largest, np.inf, rounded)
    return np.copysign(rounded, high), (beyond == 0) & (rest == 0)


def settle_dithered(
    candidate: Array, bound: Array, thresholds: Thresholds, target: FloatFormat
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Single elements with |x̂ − x| ≤ `bound` onto the grid, and which of them are certain."""
    below = dither_reals(np.nextafter(candidate - bound, -np.inf), thresholds, target)
    above = dither_reals(np.nextafter(candidate + bound, np.inf), thresholds, target)
    # Zeros of both signs compare equal, but then the sign of x is not known.
    certain = (below == above) & (np.signbit(below) == np.signbit(above)) & np.isfinite(below)
    zero = (candidate == 0) & (bound == 0)
    return np.where(zero, 0.0, below), certain | zero
