"""ggml's block types: how codes, scales and minima stand in the bytes of a block.

A block is a run of elements of a row, 32 or 256 of them. All values are float64 numbers: q4_0, q8_0, mxfp4
and q6_K are scale · code, q4_1 is d · code + m, q4_K and q5_K are (d · s) · code − (dmin · m) with six-bit
s and m per 32 elements. gguf-py computes the same in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorasmith.quantized.grid import Array, Codes, Levels
from lorasmith.quantized.small_floats import E2M1

Raw = npt.NDArray[np.uint8]
Places = tuple[Callable[[Raw], Codes], Callable[[Raw, Codes], None]]
"""How codes, or some bits of them, are read from bytes and put into them."""
Scales = Callable[[Raw], tuple[Array, Array | None]]


@dataclass(frozen=True)
class BlockType:
    """One type: N blocks are bytes [N, size] and codes [N, elements]."""

    name: str
    number: int
    """ggml's number of it."""
    elements: int
    size: int
    levels: Levels
    codes: Callable[[Raw], Codes]
    put: Callable[[Raw, Codes], None]
    """Write codes into the bytes, leaving scales and minima as they are."""
    scales: Scales
    """Scale and offset [N, elements], or [N, 1]."""


def _half(raw: Raw, at: int) -> Array:
    """A float16 of each block, [N, 1]."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view(np.float16).astype(np.float64)


def _split(at: int, count: int, run: int) -> Places:
    """Nibbles of `count` bytes from `at` on: the low halves of `run` bytes, then their high ones."""

    def read(raw: Raw) -> Codes:
        packed = raw[:, at : at + count].reshape(len(raw), -1, 1, run)
        return np.concatenate([packed & 0xF, packed >> 4], axis=2).reshape(len(raw), -1)

    def put(raw: Raw, codes: Codes) -> None:
        halves = codes.reshape(len(raw), -1, 2, run)
        raw[:, at : at + count] = ((halves[:, :, 0] & 0xF) | (halves[:, :, 1] << 4)).reshape(len(raw), -1)

    return read, put


def _bits(at: int, count: int, run: int, bits: int) -> Places:
    """The upper bits of codes: `bits` at a time from `run` bytes, the lowest for the first `run` elements."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    mask = (1 << bits) - 1

    def read(raw: Raw) -> Codes:
        packed = raw[:, at : at + count].reshape(len(raw), -1, 1, run)
        return ((packed >> shifts) & mask).astype(np.uint8).reshape(len(raw), -1)

    def put(raw: Raw, codes: Codes) -> None:
        parts = codes.reshape(len(raw), -1, 8 // bits, run) << shifts
        raw[:, at : at + count] = np.bitwise_or.reduce(parts, axis=2).reshape(len(raw), -1)

    return read, put


def _spread(values: Array, elements: int) -> Array:
    return np.repeat(values, elements // values.shape[1], axis=1)


def _six_bit(raw: Raw) -> tuple[Array, Array | None]:
    """d · s and −dmin · m of q4_K and q5_K: the six bits of eight s and eight m in twelve bytes."""
    first, second, third = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scale = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    least = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    factor, offset = _half(raw, 0) * scale, -(_half(raw, 2) * least)
    return _spread(factor, 256), _spread(offset, 256)


def _joined(low: Places, high: Places) -> Places:
    def read(raw: Raw) -> Codes:
        return np.bitwise_or(low[0](raw), np.left_shift(high[0](raw), 4)).astype(np.uint8)

    def put(raw: Raw, codes: Codes) -> None:
        low[1](raw, np.bitwise_and(codes, 0xF).astype(np.uint8))
        high[1](raw, np.right_shift(codes, 4).astype(np.uint8))

    return read, put


def _bytes(raw: Raw) -> Codes:
    return raw[:, 2:34].copy()


def _put_bytes(raw: Raw, codes: Codes) -> None:
    raw[:, 2:34] = codes


def _mx_scale(raw: Raw) -> tuple[Array, Array | None]:
    """2^(e − 127): ggml's levels are the doubled ones, and its scale half of this."""
    return np.ldexp(1.0, raw[:, :1].astype(np.int32) - 127), None


def _q6_scale(raw: Raw) -> tuple[Array, Array | None]:
    return _spread(_half(raw, 208) * np.ascontiguousarray(raw[:, 192:208]).view(np.int8), 256), None


def _scale_alone(raw: Raw) -> tuple[Array, Array | None]:
    return _half(raw, 0), None


def _scale_and_least(raw: Raw) -> tuple[Array, Array | None]:
    return _half(raw, 0), _half(raw, 2)


def _counted(first: int, stop: int) -> Levels:
    return Levels(tuple(float(level) for level in range(first, stop)))


_SIGNED = Levels(tuple(float(np.uint8(code).view(np.int8)) for code in range(256)))
_Q4_K, _Q5_LOW, _Q5_HIGH = _split(16, 128, 32), _split(48, 128, 32), _bits(16, 32, 32, 1)
_Q6_LOW, _Q6_HIGH = _split(0, 128, 64), _bits(128, 64, 32, 2)
# ggml gives code 8 as a zero without a sign.
_MX = Levels((*E2M1.by_code[:8], 0.0, *E2M1.by_code[9:]))

BLOCK_TYPES: tuple[BlockType, ...] = (
    BlockType("q4_0", 2, 32, 18, _counted(-8, 8), *_split(2, 16, 16), _scale_alone),
    BlockType("q4_1", 3, 32, 20, _counted(0, 16), *_split(4, 16, 16), _scale_and_least),
    BlockType("q8_0", 8, 32, 34, _SIGNED, _bytes, _put_bytes, _scale_alone),
    BlockType("q4_K", 12, 256, 144, _counted(0, 16), *_Q4_K, _six_bit),
    BlockType("q5_K", 13, 256, 176, _counted(0, 32), *_joined(_Q5_LOW, _Q5_HIGH), _six_bit),
    BlockType("q6_K", 14, 256, 210, _counted(-32, 32), *_joined(_Q6_LOW, _Q6_HIGH), _q6_scale),
    BlockType("mxfp4", 39, 32, 17, _MX, *_split(1, 16, 16), _mx_scale),
)
"""ggml's types, as a list to read."""
