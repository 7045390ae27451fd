"""The dither's random words by the paper, for tests: Philox4x64-10 in Python's own integers.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MASK = (1 << 64) - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Four 64-bit words from a counter of four and a key of two."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = _MULTIPLIERS[0] * c[0], _MULTIPLIERS[1] * c[2]
        c = [high >> 64 ^ c[1] ^ k[0], high & _MASK, low >> 64 ^ c[3] ^ k[1], low & _MASK]
        k = [(one + step) & _MASK for one, step in zip(k, _WEYL, strict=True)]
    return c


def threshold(seed: int, name: str, element: int) -> Fraction:
    """t of an element, as the rule of merging/numbers/dither.py says it."""
    digest = hashlib.sha256(f"lorasmith dither 1\0{seed}\0{name}".encode()).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
    word = philox([element // 8 + 1, 0, 0, 0], key)[element % 8 // 2]
    half = word >> 32 if element % 2 else word & 0xFFFFFFFF
    return Fraction(2 * (half >> 8) + 1, 1 << 25)
