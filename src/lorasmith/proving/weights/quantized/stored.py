"""What a decoder finds: a weight, the tensors that make it, and how to read its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lorasmith.errors import CheckpointError
from lorasmith.proving.weights.model_folder import ProvenTensor


@dataclass(frozen=True)
class Found:
    """One quantized weight of the base."""

    name: str
    shape: tuple[int, ...]
    format: str
    codes: ProvenTensor
    """The tensor in whose place the weight stands."""
    decode: Callable[[int, int], torch.Tensor]
    """The values of some elements from the first on, flat in float64."""
    used: tuple[str, ...]
    """Names of all stored tensors that belong to it."""


def companion(tensors: Mapping[str, ProvenTensor], name: str, weight: str) -> ProvenTensor:
    """A tensor that a weight cannot be read without."""
    if name not in tensors:
        raise CheckpointError(
            f"the quantized weight {weight!r} lacks {name!r}", expected="all tensors that its format stores"
        )
    return tensors[name]
