"""The small floats of the Open Compute Project's formats (OFP8 1.0, MX 1.0), as tables of their codes."""

from __future__ import annotations

import math

import numpy as np

from lorasmith.quantized.grid import Array, Codes, Levels


def _e4m3(code: int) -> float:
    exponent, fraction = (code >> 3) & 0xF, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    size = fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
    return -size if code & 0x80 else size


E4M3 = Levels(tuple(_e4m3(code) for code in range(256)))
"""1 sign, 4 exponent, 3 fraction bits; no infinity, the largest number is 448."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = Levels((*_E2M1, *(-size for size in _E2M1)))
"""1 sign, 2 exponent, 1 fraction bit."""


def e8m0(codes: Codes) -> Array:
    """Powers of two: 2^(code − 127); 255 is NaN."""
    scales = np.ldexp(1.0, codes.astype(np.int32) - 127)
    return np.where(codes == 255, np.nan, scales)


def unpack_nibbles(packed: Codes) -> Codes:
    """Two codes a byte along the last dimension, the first in the low half."""
    codes = np.empty((*packed.shape, 2), dtype=np.uint8)
    codes[..., 0], codes[..., 1] = packed & 0xF, packed >> 4
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_nibbles(codes: Codes) -> Codes:
    """The way back."""
    return np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], 4)).astype(np.uint8)
