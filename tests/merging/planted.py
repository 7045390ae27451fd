"""A base and an adapter whose target holds ties, subnormals and zeros; what a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_adapter, save_base

PREFIX = "base_model.model."


NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randint(5, 290, (2, 24))).logits.double()


def plant(folder: Path, dtype: torch.dtype, *, low_bits: bool) -> tuple[Path, Path]:
    """Base and adapter whose one target holds ties, subnormals and zeros."""
    save_base(folder / "base", dtype=dtype)
    save_adapter(folder / "adapter", folder / "base", target_modules=["q_proj"], r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(3)
    weights = load_file(folder / "base" / "model.safetensors")
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for layer in range(2):
        target = f"model.layers.{layer}.self_attn.q_proj.weight"
        values = torch.randn(32, 32, generator=generator)
        values[0] = 0
        values[1] *= 1e-6
        values[2, ::2] = -0.0
        values[3] = 2.0 ** torch.randint(-14, 3, (32,), generator=generator)
        weights[target] = values.to(dtype)
        down = factors[PREFIX + target.replace(".weight", ".lora_A.weight")]
        up = factors[PREFIX + target.replace(".weight", ".lora_B.weight")]
        if low_bits:
            down.copy_(torch.randint(-2, 3, down.shape, generator=generator).float())
            up.copy_(2.0 ** -torch.randint(4, 14, up.shape, generator=generator))
            up[4] = 0
            down[:, 5] = 0
        up[5] *= 1e-5
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    save_file(factors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder / "base", folder / "adapter"
