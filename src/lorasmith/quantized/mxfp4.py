"""MXFP4 as gpt-oss stores its experts (OCP MX 1.0): four-bit floats in groups of 32 with a power of two each.

`N_blocks` is uint8 [E, O, groups, 16], two codes a byte with the first one low, `N_scales` uint8 [E, O,
groups] with exponents of bias 127. In the model the stack N is transposed, [E, I, O], as transformers holds
it: a row of the model is a column here. value = level · 2^exponent, which float64 and mostly bfloat16 hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from lorasmith.checkpoint.model import Checkpoint
from lorasmith.quantized.grid import Array, Block, Codes
from lorasmith.quantized.small_floats import E2M1, e8m0, pack_nibbles
from lorasmith.quantized.weight import Part, QuantizedWeight, part

GROUP = 32


@dataclass(frozen=True)
class Mxfp4Experts:
    """A stack of experts."""

    name: str
    shape: tuple[int, ...]
    """[E, I, O]."""
    parts: Mapping[str, Part]
    format: str = "mxfp4"

    @property
    def unit(self) -> int:
        """All rows of an expert."""
        return self.shape[1]

    def block(self, start: int, stop: int) -> Block:
        """Codes and grid of some rows, which may be of several experts."""
        cuts = [start, *range((start // self.unit + 1) * self.unit, stop, self.unit), stop]
        parts = [self._of_expert(low, high) for low, high in pairwise(cuts)]
        codes = np.concatenate([codes for codes, _ in parts])
        return Block(E2M1, codes, np.concatenate([scale for _, scale in parts]))

    def _of_expert(self, start: int, stop: int) -> tuple[Codes, Array]:
        _, inputs, outputs = self.shape
        expert, low = divmod(start, self.unit)
        high = low + stop - start
        count = outputs * inputs // 2
        packed = self.parts["codes"].kept(expert * count, count).reshape(outputs, -1)
        rows = np.arange(low, high)
        both = packed[:, rows // 2]
        codes = np.where(rows % 2 == 1, both >> 4, both & 0xF).T
        groups = outputs * inputs // GROUP
        exponents = self.parts["scales"].kept(expert * groups, groups).reshape(outputs, -1)
        scale = e8m0(exponents)[:, rows // GROUP].T
        if np.isnan(scale).any():
            raise self.parts["scales"].refuse("it holds NaN (255)", "exponents up to 254")
        return np.ascontiguousarray(codes), scale

    def encode(self, start: int, codes: Codes) -> bytes:
        """One expert, turned back to [O, I]."""
        return pack_nibbles(np.ascontiguousarray(codes.T)).tobytes()

    def library(self, start: int, stop: int) -> torch.Tensor:
        """transformers: the level in bfloat16, times the power of two."""
        block = self.block(start, stop)
        levels = torch.from_numpy(block.levels.table[block.codes]).to(torch.bfloat16)
        exponents = torch.from_numpy(np.log2(block.scale).astype(np.int32))
        return torch.ldexp(levels, exponents)


class Mxfp4:
    """gpt-oss' experts."""

    name = "mxfp4"

    def find(self, stored: Checkpoint) -> list[QuantizedWeight]:
        """Every pair of blocks and scales."""
        found: list[QuantizedWeight] = []
        for name, info in stored.tensors.items():
            if not name.endswith("_blocks") or info.dtype != "U8":
                continue
            weight = name.removesuffix("_blocks")
            codes, scales = (
                part(stored, name, ("U8",), weight),
                part(stored, f"{weight}_scales", ("U8",), weight),
            )
            shape = info.shape
            if len(shape) != 4 or shape[3] != GROUP // 2 or scales.info.shape != shape[:3]:
                raise codes.refuse(
                    f"its shape is {list(shape)}, that of the scales {list(scales.info.shape)}",
                    "[experts, rows, groups, 16] and [experts, rows, groups]",
                )
            model_shape = (shape[0], shape[2] * GROUP, shape[1])
            found.append(Mxfp4Experts(weight, model_shape, {"codes": codes, "scales": scales}))
        return found
