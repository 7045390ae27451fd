"""The thresholds of a dithered merge, computed anew: Philox written from the paper, a quick test beside it.

What a dithered merge claims: an element's size is rounded up exactly if it lies above a + t·(b − a), a and b
being the format's neighbours around it. t = (2n + 1)/2²⁵, n the top 24 bits of the element's 32-bit word of a
Philox4x64-10 stream (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
eight elements to a counter, from 1 on, the low half of a word first. The key is the first half of SHA-256 of
"lorasmith dither 1", the seed in decimal and the tensor's name, joined by zero bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.proving.weights.blocks import RowBlock, sums
from lorasmith.proving.weights.rounding import Floats, Ints, judge_rounding

Words = npt.NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_STEP_ELEMENTS = 1 << 16
"""Elements tested at a time, so that the many arrays of the test stay in a core's cache."""


@dataclass(frozen=True)
class Dither:
    """The stream of one tensor, `columns` elements to a row of its matrix."""

    key: tuple[int, int]
    columns: int

    def shares(self, rows: Ints, cols: Ints) -> Floats:
        """t of single elements, by the row of the whole matrix; exact in float64."""
        elements = rows * self.columns + cols
        words = philox(elements // 8, self.key)
        word = np.take_along_axis(words, (elements % 8 // 2)[:, None], axis=1)[:, 0]
        return _share(np.where(elements % 2 == 1, word >> _HALF, word & _LOW))

    def rows(self, start: int, end: int) -> Floats:
        """t of whole rows, [rows, columns]."""
        first, last = start * self.columns, end * self.columns
        words = philox(np.arange(first // 8, (last + 7) // 8), self.key)
        halves = np.stack([words & _LOW, words >> _HALF], axis=2).reshape(-1)
        skipped = first - first // 8 * 8
        return _share(halves[skipped : skipped + last - first]).reshape(end - start, self.columns)


def make_dither(seed: int, name: str, columns: int) -> Dither:
    """The stream of the tensor `name` for the merge's seed."""
    digest = hashlib.sha256(b"lorasmith dither 1\0" + f"{seed}\0{name}".encode()).digest()
    low, high = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8))
    return Dither((low, high), columns)


def _share(halves: Words) -> Floats:
    return (2.0 * (halves >> np.uint64(8)).astype(np.float64) + 1.0) * 2.0**-25


def philox(blocks: Ints, key: tuple[int, int]) -> Words:
    """[n, 4] words of the counters `blocks` + 1 (section 4 of the paper; rounds of multiply, swap, xor)."""
    c0 = blocks.astype(np.uint64) + np.uint64(1)
    c1, c2, c3 = (np.zeros_like(c0) for _ in range(3))
    for number in range(_ROUNDS):
        k0, k1 = (
            np.uint64((start + number * step) % (1 << 64)) for start, step in zip(key, _WEYL, strict=True)
        )
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return np.stack([c0, c1, c2, c3], axis=1)


def _multiply(constant: np.uint64, x: Words) -> tuple[Words, Words]:
    """Both words of a 128-bit product, by halves of 32 bits."""
    a_high, a_low = constant >> _HALF, constant & _LOW
    b_high, b_low = x >> _HALF, x & _LOW
    low = a_low * b_low
    middle = a_high * b_low + (low >> _HALF)
    other = a_low * b_high + (middle & _LOW)
    return a_high * b_high + (middle >> _HALF) + (other >> _HALF), constant * x


def doubtful_dithered(block: RowBlock, dither: Dither) -> Ints:
    """Flat positions, ascending, of the elements that are not certainly what their threshold asks for."""
    rows, columns = block.stored.shape
    step = max(1, _STEP_ELEMENTS // columns)
    return np.concatenate(
        [_step(block, dither, start, min(start + step, rows)) for start in range(0, rows, step)]
    )


def _step(block: RowBlock, dither: Dither, start: int, end: int) -> Ints:
    """The error bound is that of `blocks.sums`; what it does not settle is named, never rejected."""
    stored, source = block.stored[start:end], block.source[start:end]
    first = block.start + start
    values, reach, bound = sums(source, block.terms, first, torch.float64)
    size = (source.to(torch.float64).abs_() + reach).numpy()
    x: Floats = values.numpy()
    error = size * (bound * (1 + 2.0**-20)) + 2.0**-900
    if block.gain:
        per_row = block.gain.per_row
        gain = (block.gain.values[start:end] if per_row else block.gain.values).numpy()
        x = x * gain
        error = error * np.abs(gain) * (1 + 2.0**-20) + np.abs(x) * (block.gain.error + 2.0**-50)
    magnitude, negative = block.grid.magnitudes(stored)
    share = dither.rows(first, block.start + end)
    # The sign of a zero counts only where x is exact, which none is here.
    verdict = judge_rounding(block.grid, magnitude, negative, x, error, negative, share)
    return np.flatnonzero(~verdict.right) + start * block.stored.shape[1]
