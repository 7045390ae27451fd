"""Bases and adapters whose weights are the same bits on every processor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.tiny import save_adapter, save_base


def fixed_base(
    folder: Path, architecture: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Path:
    """A base of two or more shards."""
    save_base(folder, architecture, dtype=dtype, max_shard_size="40KB", **options)
    for shard in folder.glob("*.safetensors"):
        _refill(shard, seed="base")
    return folder


def fixed_adapter(folder: Path, base: Path, *, seed: str = "adapter", **config: Any) -> Path:
    """An adapter that PEFT wrote, with fixed numbers in place of its random ones."""
    save_adapter(folder, base, **config)
    _refill(folder / "adapter_model.safetensors", seed=seed)
    return folder


def _refill(path: Path, *, seed: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    for name, tensor in tensors.items():
        # PEFT keeps a copy of the base's embedding beside its factors, which must stay that copy.
        if tensor.is_floating_point() and not name.endswith("base_layer.weight"):
            tensors[name] = numbers(tensor, f"{seed} {name}")
    save_file(tensors, path, metadata=metadata)


def numbers(like: torch.Tensor, name: str) -> torch.Tensor:
    """Multiples of 2**-22 between ±0.5 from a hash of the name, rounded to the type; scales are around 1."""
    drawn = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * like.numel()), "<u4") >> 10
    values = torch.from_numpy(drawn.astype(np.float64)) / 2**22 - 0.5
    if "norm" in name or "ln_" in name or "magnitude" in name:
        values = 1 + values / 4
    return values.reshape(like.shape).to(like.dtype)
