"""FP8 e4m3 with scales per block, row or tensor: DeepSeek and Qwen3 FP8, compressed-tensors, ModelOpt.

Two spellings. `N_scale_inv` beside a tensor N (`X.weight`, or a stack of experts [E, O, I]): one scale per
block of `weight_block_size`, 128 × 128, those at the edges only partly filled. `X.weight_scale` beside
`X.weight`: one for the tensor, one a row, or one a block (`block_structure`). value = code · scale, which
float64 holds.

transformers multiplies in float32 and rounds to the model's type; compressed-tensors computes in the type
of the scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorasmith.checkpoint.model import Checkpoint
from lorasmith.checkpoint.values import TORCH_TYPES
from lorasmith.quantized.grid import Array, Block, Codes
from lorasmith.quantized.small_floats import E4M3
from lorasmith.quantized.weight import (
    Part,
    QuantizedWeight,
    model_type,
    optional,
    part,
    require_numbers,
    settings,
)

_SCALES = ("F32", "BF16", "F16")
ACTIVATIONS = ("input_scale", "activation_scale", "input_zero_point")


@dataclass(frozen=True)
class Fp8Weight:
    """A weight in FP8."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    block_size: tuple[int, int]
    """Rows and columns that share a scale."""
    computed_in: torch.dtype
    """The type that the library multiplies in."""
    dtype: torch.dtype
    """The type that it gives."""
    format: str

    @property
    def unit(self) -> int:
        """All rows of a matrix."""
        return self.shape[-2]

    def block(self, start: int, stop: int) -> Block:
        """Codes and grid of some rows."""
        width = self.shape[-1]
        codes = self.parts["codes"].read(start * width, (stop - start) * width).reshape(-1, width)
        require_numbers(codes, E4M3, self.parts["codes"])
        return Block(E4M3, codes, self._scale(start, stop))

    def _scale(self, start: int, stop: int) -> Array:
        height, wide = self.block_size
        stored = self.parts["scale"]
        across = -(-self.shape[-1] // wide)
        rows = np.arange(start, stop)
        # Blocks begin anew with each expert of a stack.
        band = rows // self.unit * -(-self.unit // height) + rows % self.unit // height
        low, high = int(band[0]), int(band[-1]) + 1
        scales = stored.scales(low * across, (high - low) * across).astype(np.float64).reshape(-1, across)
        columns = np.repeat(scales, wide, axis=1)[:, : self.shape[-1]] if across > 1 else scales
        return columns[band - low]

    def encode(self, start: int, codes: Codes) -> bytes:
        """The codes are the bytes."""
        return codes.tobytes()

    def library(self, start: int, stop: int) -> torch.Tensor:
        """code · scale in the type of the computation, then in the type of the result."""
        block = self.block(start, stop)
        codes = torch.from_numpy(block.codes.copy()).view(torch.float8_e4m3fn).to(self.computed_in)
        scale = torch.from_numpy(np.ascontiguousarray(block.scale)).to(self.computed_in)
        return (codes * scale).to(self.dtype)


class Fp8:
    """FP8 e4m3."""

    name = "fp8"

    def find(self, stored: Checkpoint) -> list[QuantizedWeight]:
        """Every FP8 tensor with a scale beside it."""
        found: list[QuantizedWeight] = []
        for name, info in stored.tensors.items():
            if info.dtype == "F8_E4M3" and len(info.shape) > 1:
                if f"{name}_scale_inv" in stored.tensors:
                    found.append(_inverse(stored, name))
                elif f"{name}_scale" in stored.tensors and name.endswith(".weight"):
                    found.append(_compressed(stored, name))
        return found


def _inverse(stored: Checkpoint, name: str) -> Fp8Weight:
    scale = part(stored, f"{name}_scale_inv", _SCALES, name)
    size = settings(stored).get("weight_block_size")
    size = size if isinstance(size, list) and len(size) == 2 else [128, 128]
    dtype = TORCH_TYPES[model_type(stored)]
    return _weight(stored, name, scale, _pair(size, scale), torch.float32, dtype, "fp8-block")


def _compressed(stored: Checkpoint, name: str) -> Fp8Weight:
    scale = part(stored, f"{name}_scale", _SCALES, name)
    dtype = TORCH_TYPES[scale.info.dtype]
    size = [128, 128]
    for group in (settings(stored).get("config_groups") or {}).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and isinstance(weights.get("block_structure"), list):
            size = weights["block_structure"]
    return _weight(stored, name, scale, _pair(size, scale), dtype, dtype, "fp8")


def _pair(size: Sequence[object], scale: Part) -> tuple[int, int]:
    if len(size) != 2 or not all(isinstance(extent, int) and extent > 0 for extent in size):
        raise scale.refuse(f"the config's blocks have the size {str(size)[:80]}", "[rows, columns]")
    return int(str(size[0])), int(str(size[1]))


def _weight(
    stored: Checkpoint,
    name: str,
    scale: Part,
    size: tuple[int, int],
    computed_in: torch.dtype,
    dtype: torch.dtype,
    format_: str,
) -> Fp8Weight:
    codes = part(stored, name, ("F8_E4M3",), name)
    shape, scales = codes.info.shape, scale.info.elements
    stack = math.prod(shape[:-2])
    if scales == 1:
        # One scale is a block as large as everything.
        size = (shape[-2] * stack, shape[-1])
    elif scales == stack * shape[-2] and scale.info.shape[-1:] in ((1,), (shape[-2],)):
        size = (1, shape[-1])
    elif scales != stack * -(-shape[-2] // size[0]) * -(-shape[-1] // size[1]):
        raise scale.refuse(
            f"it has the shape {list(scale.info.shape)}",
            f"a scale per tensor, row or block of {size[0]} × {size[1]} of {list(shape)}",
        )
    module = name.removesuffix(".weight")
    parts = {"codes": codes, "scale": scale, **optional(stored, module, ACTIVATIONS)}
    return Fp8Weight(name, shape, parts, size, computed_in, dtype, format_)
