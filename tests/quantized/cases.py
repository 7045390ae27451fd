"""A case per format: a weight quantized by its own library, and what that library makes of it again.

A row each: to add a format, add a function and name it in `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

NAME = "model.layers.0.self_attn.q_proj.weight"
MODULE = NAME.removesuffix(".weight")


@dataclass(frozen=True)
class Made:
    """A quantized weight as it is stored."""

    tensors: dict[str, torch.Tensor]
    reference: torch.Tensor
    """What the format's own library dequantizes it to, in the library's type, as the model has it."""
    config: dict[str, Any] = field(default_factory=dict)
    name: str = NAME
    """What the weight is called in the model."""


def random_weight(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Normal numbers with outliers, a row of zeros and some zeros of their own."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[0, :3] *= 40
    weight[1] = 0
    weight[2, ::5] = 0
    return weight


def bitsandbytes_4bit(kind: str, nested: bool, dtype: torch.dtype = torch.bfloat16) -> Callable[..., Made]:
    def make(weight: torch.Tensor) -> Made:
        functional = pytest.importorskip("bitsandbytes.functional")
        codes, state = functional.quantize_4bit(
            weight.to(dtype), quant_type=kind, compress_statistics=nested, blocksize=64
        )
        tensors = {NAME: codes, **{f"{NAME}.{key}": part for key, part in state.as_dict(packed=True).items()}}
        reference = (
            functional.dequantize_4bit(codes, state) if weight.shape[1] % 64 == 0 else _generic(codes, state)
        )
        return Made(tensors, reference, {"quant_method": "bitsandbytes"})

    return make


def _generic(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """The library's own code without a kernel: its kernel for processors (0.50.2) takes wrong scales where a
    block crosses rows, off by 70 to 85 % in norm from what its quantizer was given."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code
    from bitsandbytes.functional import dequantize_blockwise

    absmax = (
        state.absmax if not state.nested else dequantize_blockwise(state.absmax, state.state2) + state.offset
    )
    table = _get_4bit_code(state.quant_type, codes.device)
    return _dequantize_4bit_compute(
        codes.reshape(-1), absmax, table, state.blocksize, state.shape, state.dtype
    )


def llm_int8(weight: torch.Tensor) -> Made:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scb, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    tensors = {
        NAME: codes,
        f"{MODULE}.SCB": scb,
        f"{MODULE}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return Made(tensors, functional.int8_vectorwise_dequant(codes, scb), {"quant_method": "bitsandbytes"})


CASES: dict[str, Callable[[torch.Tensor], Made]] = {
    "nf4": bitsandbytes_4bit("nf4", nested=False),
    "nf4 nested": bitsandbytes_4bit("nf4", nested=True),
    "nf4 nested float16": bitsandbytes_4bit("nf4", nested=True, dtype=torch.float16),
    "nf4 across rows": bitsandbytes_4bit("nf4", nested=True),
    "fp4": bitsandbytes_4bit("fp4", nested=False, dtype=torch.float32),
    "fp4 nested": bitsandbytes_4bit("fp4", nested=True),
    "int8": llm_int8,
}

SHAPES: dict[str, tuple[int, int]] = {"nf4 across rows": (24, 80)}
"""Shapes of the random weight other than (24, 128)."""
