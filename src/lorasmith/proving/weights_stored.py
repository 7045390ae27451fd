"""Single tensors as the proof reads them: rows of a file, at the place that `safetensors` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from lorasmith.proving.weights_reading import ProvenFile

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of element types in a safetensors header; others (8-bit floats and the like) are not read."""

BYTES: Mapping[str, int] = {
    **{name: dtype.itemsize for name, dtype in DTYPES.items()},
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "C64": 8,
}
"""Sizes of elements; beyond those that are read, what it takes to find the next tensor."""

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: where it is and what it looks like, without its values."""

    source: ProvenFile
    start: int
    """Byte of the file where its values begin."""
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        """Where it is."""
        return self.source.path

    @property
    def elements(self) -> int:
        """1 for a tensor without dimensions."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of its values on disk."""
        return self.elements * BYTES[self.dtype]

    @property
    def columns(self) -> int:
        """Width of the matrix that `rows` shows: the last dimension, or 1 for a vector."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    def rows(self, index: Index = ()) -> torch.Tensor:
        """The part at `index` (whole numbers, then perhaps a slice), as a matrix [rows, columns].

        Raises `InputError` where the file cannot be read any more.
        """
        first, count = 0, self.elements
        for size, at in zip(self.shape, index, strict=False):
            count //= size
            low, high = (at.start, at.stop) if isinstance(at, slice) else (at, at + 1)
            first += low * count
            if isinstance(at, slice):
                count *= high - low
        return self._values(first, count).reshape(-1, self.columns)

    def _values(self, first: int, count: int) -> torch.Tensor:
        width, dtype = BYTES[self.dtype], DTYPES[self.dtype]
        raw = self.source.read(self.start + first * width, count * width)
        if raw.storage_offset() % width:
            raw = raw.clone()  # a file need not align its tensors, but a view of numbers must
        return raw.view(dtype)

    def whole(self) -> torch.Tensor:
        """All values in the tensor's own shape."""
        return self.rows().reshape(self.shape)
