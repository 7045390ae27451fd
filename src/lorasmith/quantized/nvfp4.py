"""NVFP4: four-bit floats in groups of 16 with an e4m3 scale each, and one float32 scale over all.

compressed-tensors (`nvfp4-pack-quantized`): `X.weight_packed`, `X.weight_scale`, `X.weight_global_scale`,
which divides: the scale of a group is the float32 quotient e4m3 / global, as the library computes it.
ModelOpt: `X.weight`, `X.weight_scale`, `X.weight_scale_2`, which multiplies: the product is a number of
float64. The first code of a byte is the low half.

compressed-tensors gives level · scale in float32, then bfloat16. ModelOpt's checkpoints are read by
inverting the second scale in float32 and going on as above; what is multiplied here without error differs
from that by a unit in float32's last place or two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lorasmith.checkpoint.model import Checkpoint
from lorasmith.quantized.grid import Array, Block, Codes
from lorasmith.quantized.small_floats import E2M1, E4M3, pack_nibbles, unpack_nibbles
from lorasmith.quantized.weight import Part, QuantizedWeight, optional, part, require_numbers

GROUP = 16
_OTHERS = ("input_global_scale", "input_scale")


@dataclass(frozen=True)
class Nvfp4Weight:
    """A weight in NVFP4."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    divides: bool
    """Whether the scale over all divides."""
    format: str = "nvfp4"

    @property
    def unit(self) -> int:
        """All rows."""
        return self.shape[0]

    def block(self, start: int, stop: int) -> Block:
        """Codes and grid of some rows."""
        width = self.shape[1]
        packed = self.parts["codes"].read(start * width // 2, (stop - start) * width // 2)
        codes = unpack_nibbles(packed.reshape(-1, width // 2))
        return Block(E2M1, codes, np.repeat(self._scales(start, stop), GROUP, axis=1))

    def _scales(self, start: int, stop: int) -> Array:
        across = self.shape[1] // GROUP
        stored = self.parts["scale"].read(start * across, (stop - start) * across).reshape(-1, across)
        require_numbers(stored, E4M3, self.parts["scale"])
        over_all = self.parts["global"].scales()[0]
        if self.divides:
            return (E4M3.table[stored].astype(np.float32) / over_all).astype(np.float64)
        return E4M3.table[stored] * np.float64(over_all)

    def encode(self, start: int, codes: Codes) -> bytes:
        """Two codes a byte."""
        return pack_nibbles(codes).tobytes()

    def library(self, start: int, stop: int) -> torch.Tensor:
        """level · scale in float32, then bfloat16."""
        block = self.block(start, stop)
        scale = block.scale.astype(np.float32)
        if not self.divides:
            across = self.shape[1] // GROUP
            stored = self.parts["scale"].read(start * across, (stop - start) * across).reshape(-1, across)
            inverse = np.float32(1) / self.parts["global"].scales()[0]
            scale = np.repeat(E4M3.table[stored].astype(np.float32) / inverse, GROUP, axis=1)
        return torch.from_numpy(block.levels.table[block.codes].astype(np.float32) * scale).to(torch.bfloat16)


class Nvfp4:
    """compressed-tensors' and ModelOpt's spellings."""

    name = "nvfp4"

    def find(self, stored: Checkpoint) -> list[QuantizedWeight]:
        """Every weight with both scales."""
        found: list[QuantizedWeight] = []
        for name in stored.tensors:
            for leaf, codes in (("weight_global_scale", "weight_packed"), ("weight_scale_2", "weight")):
                module = name.removesuffix(f".{leaf}")
                packed = f"{module}.{codes}"
                # A scale over all stands beside FP8 codes as well.
                if module != name and packed in stored.tensors and stored.tensors[packed].dtype == "U8":
                    found.append(_weight(stored, module, packed, name))
        return found


def _weight(stored: Checkpoint, module: str, packed: str, over_all: str) -> Nvfp4Weight:
    name = f"{module}.weight"
    parts = {
        "codes": part(stored, packed, ("U8",), name),
        "scale": part(stored, f"{module}.weight_scale", ("F8_E4M3",), name),
        "global": part(stored, over_all, ("F32",), name),
        **optional(stored, module, _OTHERS),
    }
    rows, half = (*parts["codes"].info.shape, 0, 0)[:2]
    shape = (rows, 2 * half)
    if len(parts["codes"].info.shape) != 2 or parts["scale"].info.shape != (rows, shape[1] // GROUP):
        raise parts["scale"].refuse(
            f"its shape is {list(parts['scale'].info.shape)}", f"a scale per {GROUP} of {list(shape)}"
        )
    if parts["global"].info.elements != 1 or not parts["global"].scales()[0] > 0:
        raise parts["global"].refuse("it is no positive number", "one scale over the whole weight")
    return Nvfp4Weight(name, shape, parts, divides=over_all.endswith("global_scale"))
