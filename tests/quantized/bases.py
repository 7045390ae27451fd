"""Small quantized bases as transformers and bitsandbytes write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import save_base, tiny_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 128}
"""Widths that blocks of 64 divide, as in real models."""


def save_bitsandbytes(folder: Path, plain: Path, *, max_shard_size: str = "5GB", **settings: Any) -> Path:
    """The model in `plain`, quantized by bitsandbytes through transformers."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=quantization, dtype=torch.bfloat16
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def save_plain(folder: Path) -> Path:
    """A tiny llama in bfloat16."""
    return save_base(folder, "llama", **SIZES)
