"""Single tensors as the proof reads them: rows of a file, through `safetensors` alone.

A handle maps its file into memory, and every page that was looked at counts as resident until the handle
and all views into it are gone. So each thread lets go of a handle after it has read a bounded amount.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorasmith.errors import InputError, os_errors

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

BYTES: Mapping[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}

Index = tuple[int | slice, ...]


_READ_BYTES = 32 << 20
"""A handle's pages that may be resident before it is opened anew: with two threads 200 MiB in all."""

_local = threading.local()


def _handle(file: Path) -> Any:
    """This thread's handle on the file as it is now."""
    handles: dict[Path, list[Any]] = _local.__dict__.setdefault("handles", {})
    status = file.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    held = handles.get(file)
    if held is None or held[1] != identity or held[2] > _READ_BYTES:
        if len(handles) >= 3:
            handles.clear()
        held = handles[file] = [safe_open(file, framework="pt"), identity, 0]
    return held[0]


def _note_read(file: Path, count: int) -> None:
    held = _local.handles.get(file)
    if held:
        held[2] += count


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: where it is and what it looks like, without its values."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

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
        """The part at `index`, as a matrix [rows, columns]; a view of the mapped file.

        Raises `InputError` where the file cannot be read any more.
        """
        with os_errors(self.file, "read"):
            try:
                handle = _handle(self.file)
                if self.shape:
                    part: torch.Tensor = handle.get_slice(self.name)[index or (slice(None),)]
                else:
                    part = handle.get_tensor(self.name)
            except SafetensorError as error:
                raise InputError(f"tensor {self.name!r} cannot be read: {error}", where=self.file) from error
        _note_read(self.file, part.nbytes)
        return part.reshape(-1, self.columns)

    def whole(self) -> torch.Tensor:
        """All values in the tensor's own shape."""
        return self.rows().reshape(self.shape)
