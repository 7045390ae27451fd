"""LLM.int8 of bitsandbytes (arXiv 2208.07339): int8 codes and the largest size of each row.

`X.weight` is int8, `X.SCB` float32 with one scale a row: value = code · SCB / 127. That quotient is no
number of float64; its value here is code · SCB, which float64 holds, divided once.

The library multiplies in float32, by SCB and then by 1/127.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lorasmith.checkpoint.model import Checkpoint
from lorasmith.quantized.grid import Block, Codes, Levels
from lorasmith.quantized.weight import Part, QuantizedWeight, part

# The quantizer never writes -128, but it is a number all the same.
LEVELS = Levels(tuple(float(np.uint8(code).view(np.int8)) for code in range(256)))
_PER_127 = 7.874015718698502e-3


@dataclass(frozen=True)
class Weight8:
    """A weight of LLM.int8."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    format: str = "int8"

    @property
    def unit(self) -> int:
        """All rows."""
        return self.shape[0]

    def block(self, start: int, stop: int) -> Block:
        """Codes and grid of some rows."""
        width = self.shape[1]
        codes = self.parts["codes"].read(start * width, (stop - start) * width).view(np.uint8)
        scale = self.parts["SCB"].scales(start, stop - start).astype(np.float64)[:, None]
        return Block(LEVELS, codes.reshape(-1, width), scale, divisor=127.0)

    def encode(self, start: int, codes: Codes) -> bytes:
        """The codes are the bytes."""
        return codes.tobytes()

    def library(self, start: int, stop: int) -> torch.Tensor:
        """code · SCB · (1/127) in float32."""
        block = self.block(start, stop)
        codes = torch.from_numpy(block.codes.view(np.int8).copy())
        return codes * torch.from_numpy(block.scale.astype(np.float32)) * _PER_127


class Bitsandbytes8:
    """LLM.int8."""

    name = "bitsandbytes 8-bit"

    def find(self, stored: Checkpoint) -> list[QuantizedWeight]:
        """Every int8 weight with an SCB beside it."""
        found: list[QuantizedWeight] = []
        for name in stored.tensors:
            if not name.endswith(".SCB"):
                continue
            module = name.removesuffix(".SCB")
            weight = f"{module}.weight"
            parts = {
                "codes": part(stored, weight, ("I8",), weight),
                "SCB": part(stored, name, ("F32",), weight),
            }
            shape = parts["codes"].info.shape
            if len(shape) != 2 or parts["SCB"].info.elements != shape[0]:
                raise parts["SCB"].refuse(
                    f"it has {parts['SCB'].info.elements} scales", f"one for each row of {list(shape)}"
                )
            layout = f"{module}.weight_format"
            if layout in stored.tensors:
                parts["weight_format"] = part(stored, layout, ("U8",), weight)
                if parts["weight_format"].read().any():
                    raise parts["weight_format"].refuse("it says that the rows are tiled", "0: row by row")
            found.append(Weight8(weight, shape, parts))
        return found
