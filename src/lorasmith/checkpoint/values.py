"""Whole tensors of a file, as they are stored."""

from __future__ import annotations

from pathlib import Path

import torch

from lorasmith.checkpoint.header import TensorInfo
from lorasmith.errors import os_errors
from lorasmith.files.inputs import open_input

TORCH_TYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """A whole tensor as it is stored."""
    with os_errors(path, "read"), open_input(path) as handle:
        handle.seek(info.start)
        raw = bytearray(handle.read(info.nbytes))
    if not raw:
        return torch.empty(info.shape, dtype=TORCH_TYPES[info.dtype])
    return torch.frombuffer(raw, dtype=TORCH_TYPES[info.dtype]).reshape(info.shape)
