"""bitsandbytes in 4 bits: NF4 and FP4, the scales themselves quantized or not (arXiv 2305.14314).

`X.weight` holds two codes a byte, the first in the high half, over the flattened weight; `X.weight.absmax`
a scale per block of 64 (or another power of two) of it, so that a block may cross rows. With double
quantization the scales are codes too: absmax[b] = nested_quant_map[code] · nested_absmax[b / 256] + offset,
which the library computes in float32, and so does this: the scale of a block is that float32 number. The
rest stands in `X.weight.quant_state.bitsandbytes__nf4`, JSON as bytes.

The library gives level · absmax in float32, rounded once more to the type of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorasmith.checkpoint.model import Checkpoint
from lorasmith.parsing import parse_json
from lorasmith.quantized.grid import Array, Block, Codes, Levels
from lorasmith.quantized.weight import Part, QuantizedWeight, part

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4 = tuple(float(np.float32(np.float32(size) / np.float32(12))) for size in (0, 0.0625, 8, 12, 4, 6, 2, 3))
# The library reads code 8 as a zero without a sign.
FP4 = (*_FP4, 0.0, *(-size for size in _FP4[1:]))

LEVELS = {"nf4": Levels(NF4), "fp4": Levels(FP4)}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Weight4:
    """A weight in NF4 or FP4."""

    name: str
    shape: tuple[int, ...]
    format: str
    parts: Mapping[str, Part]
    block_size: int
    dtype: torch.dtype
    """The type that the library dequantizes to."""
    nested_size: int = 0
    """Scales per scale of the scales; 0 without double quantization."""
    nested_offset: float = 0.0

    @property
    def unit(self) -> int:
        """All rows."""
        return math.prod(self.shape[:-1])

    def absmax(self, low: int, high: int) -> Array:
        """The scales of some blocks, float32 numbers in float64."""
        if not self.nested_size:
            return self.parts["absmax"].scales(low, high - low).astype(np.float64)
        codes = self.parts["absmax"].read(low, high - low)
        begin, end = low // self.nested_size, -(-high // self.nested_size)
        outer = self.parts["nested_absmax"].scales(begin, end - begin)
        outer = np.repeat(outer, self.nested_size)[low - begin * self.nested_size :][: high - low]
        inner = self.parts["nested_quant_map"].scales()[codes] * outer
        return (inner + np.float32(self.nested_offset)).astype(np.float64)

    def block(self, start: int, stop: int) -> Block:
        """Codes and grid of some rows."""
        width = self.shape[-1]
        first, last = start * width, stop * width
        begin = first // 2
        raw = self.parts["codes"].read(begin, -(-last // 2) - begin)
        codes = np.empty((len(raw), 2), dtype=np.uint8)
        codes[:, 0], codes[:, 1] = raw >> 4, raw & 0xF
        flat = codes.reshape(-1)[first - 2 * begin : last - 2 * begin]
        low, high = first // self.block_size, -(-last // self.block_size)
        scale = np.repeat(self.absmax(low, high), self.block_size)
        scale = scale[first - low * self.block_size : last - low * self.block_size]
        shape = (stop - start, width)
        return Block(LEVELS[self.format], flat.reshape(shape), scale.reshape(shape))

    def encode(self, start: int, codes: Codes) -> bytes:
        """Two codes a byte, the first one high; an odd last one stands alone, its other half zero."""
        flat = codes.reshape(-1)
        if len(flat) % 2:
            flat = np.append(flat, np.uint8(0))
        return bytes((flat[0::2] << 4) | flat[1::2])

    def library(self, start: int, stop: int) -> torch.Tensor:
        """level · absmax in float32, then in the model's type."""
        block = self.block(start, stop)
        levels = block.levels.table[block.codes].astype(np.float32)
        return torch.from_numpy(levels * block.scale.astype(np.float32)).to(self.dtype)


class Bitsandbytes4:
    """NF4 and FP4."""

    name = "bitsandbytes 4-bit"

    def find(self, stored: Checkpoint) -> list[QuantizedWeight]:
        """Every weight with a quant state beside it."""
        found: list[QuantizedWeight] = []
        for name in stored.tensors:
            weight, mark, kind = name.partition(_STATE)
            if mark:
                found.append(_weight(stored, weight, name, kind))
        return found


def _weight(stored: Checkpoint, name: str, state_name: str, kind: str) -> Weight4:
    state_part = part(stored, state_name, ("U8",), name)
    state = _state(state_part, kind)
    nested = "nested_blocksize" in state
    parts = {
        "codes": part(stored, name, ("U8",), name),
        "quant_state": state_part,
        "absmax": part(stored, f"{name}.absmax", ("U8",) if nested else ("F32",), name),
        "quant_map": part(stored, f"{name}.quant_map", ("F32",), name),
    }
    if nested:
        for role in ("nested_absmax", "nested_quant_map"):
            parts[role] = part(stored, f"{name}.{role}", ("F32",), name)
    weight = Weight4(
        name=name,
        shape=tuple(state["shape"]),
        format=kind,
        parts=parts,
        block_size=state["blocksize"],
        dtype=TYPES[state["dtype"]],
        nested_size=state["nested_blocksize"] if nested else 0,
        nested_offset=state["nested_offset"] if nested else 0.0,
    )
    _check(weight)
    return weight


def _state(state: Part, kind: str) -> dict[str, Any]:
    """The JSON of a quant state; `CheckpointError` for anything that the library does not write."""
    try:
        body = parse_json(state.read().tobytes())
    except ValueError as error:
        raise state.refuse(f"it is not JSON ({error})", "the quant state as JSON") from error
    if not isinstance(body, dict):
        raise state.refuse("it is no JSON object", "the quant state as a JSON object")
    shape = body.get("shape")
    right = (
        kind in LEVELS
        and body.get("quant_type") == kind
        and body.get("blocksize") in BLOCK_SIZES
        and body.get("dtype") in TYPES
        and isinstance(shape, list)
        and len(shape) > 0
        and all(isinstance(extent, int) and extent > 0 for extent in shape)
    )
    if right and "nested_blocksize" in body:
        offset = body.get("nested_offset")
        right = (
            body["nested_blocksize"] in BLOCK_SIZES
            and body.get("nested_dtype") == "float32"
            and isinstance(offset, float)
            and math.isfinite(offset)
        )
    if not right:
        raise state.refuse(f"it says {str(body)[:200]}", "a quant state as bitsandbytes writes it")
    return body


def _check(weight: Weight4) -> None:
    elements = math.prod(weight.shape)
    blocks = -(-elements // weight.block_size)
    sizes = {"codes": -(-elements // 2), "absmax": blocks, "quant_map": 16}
    if weight.nested_size:
        sizes |= {"nested_absmax": -(-blocks // weight.nested_size), "nested_quant_map": 256}
    for role, size in sizes.items():
        found = weight.parts[role]
        if found.info.elements != size:
            raise found.refuse(f"it has {found.info.elements} elements", f"{size} for {list(weight.shape)}")
    # The library's kernels know the table by heart: another one would be read by some of them alone.
    table = LEVELS[weight.format].table
    if not np.array_equal(weight.parts["quant_map"].read().astype(np.float64), table):
        raise weight.parts["quant_map"].refuse("it is another table", f"that of {weight.format}")
