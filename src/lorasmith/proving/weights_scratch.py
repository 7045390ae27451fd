"""The quick test's working memory: fresh pages for every step would cost more than the arithmetic."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_EXPONENT = {torch.float32: 0xFF << 23, torch.float64: 0x7FF << 52}
"""The bits of a number that hold its power of two."""

_local = threading.local()


@dataclass(frozen=True)
class Numbers:
    """The same memory for NumPy, whose operations cost less to call; flat, and more that it alone uses."""

    x: Any
    power: Any
    power_bits: Any
    """`power` as integers."""
    exponent: Any
    """One integer: the bits of the power of two."""
    distance: Any
    mask: Any


def workspace(kind: torch.dtype, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor, Numbers]:
    """Two matrices of a shape and what goes with them: this thread's, overwritten at its next call."""
    held = _local.__dict__.setdefault("held", {})
    memory, views = held.get(kind, (None, {}))
    if memory is None or memory.shape[1] < shape.numel():
        memory, views = torch.empty(4, shape.numel(), dtype=kind), {}
        held[kind] = memory, views
    if shape not in views:
        views[shape] = _view(memory, shape)
    return views[shape]


def _view(memory: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor, Numbers]:
    x, power, distance, mask = (part[: shape.numel()] for part in memory)
    integer = {torch.float32: np.int32, torch.float64: np.int64}[memory.dtype]
    bits = power.numpy().view(integer)
    truth = mask.view(torch.bool)[: shape.numel()].numpy()
    exponent = integer(_EXPONENT[memory.dtype])
    numbers = Numbers(x.numpy(), power.numpy(), bits, exponent, distance.numpy(), truth)
    return x.view(shape), power.view(shape), numbers
