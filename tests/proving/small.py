"""A small model, adapters for it, and right merges, made by rational arithmetic alone: no code is shared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

FORMATS = {torch.bfloat16: (8, -126, 127), torch.float16: (11, -14, 15), torch.float32: (24, -126, 127)}
"""Bits of the significand, least and greatest exponent."""

SHAPES = {"q_proj": (12, 12), "k_proj": (12, 12), "up_proj": (16, 12), "down_proj": (12, 16)}


def round_fraction(x: Fraction, dtype: torch.dtype) -> float:
    """The nearest number of a format, ties to even, as Python's own `round` decides them."""
    bits, least, greatest = FORMATS[dtype]
    if x == 0:
        return 0.0
    exponent = max(_log2(abs(x)), least)
    unit = Fraction(2) ** (exponent - bits + 1)
    rounded = round(x / unit) * unit
    if abs(rounded) >= Fraction(2) ** (greatest + 1):
        return math.copysign(math.inf, x)
    return math.copysign(float(rounded), x)


def _log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def rounded(values: list[list[Fraction]], dtype: torch.dtype) -> torch.Tensor:
    """A matrix of correctly rounded numbers."""
    return torch.tensor([[round_fraction(x, dtype) for x in row] for row in values], dtype=torch.float64).to(
        dtype
    )


def fractions(matrix: torch.Tensor) -> list[list[Fraction]]:
    """The stored numbers of a matrix, exactly."""
    return [[Fraction(x) for x in row] for row in matrix.double().tolist()]


def product(b: torch.Tensor, a: torch.Tensor) -> list[list[Fraction]]:
    """B·A, exactly."""
    left, right = fractions(b), fractions(a.T)
    return [[sum((x * y for x, y in zip(r, c, strict=True)), Fraction(0)) for c in right] for r in left]


def add(*terms: tuple[Fraction, list[list[Fraction]]]) -> list[list[Fraction]]:
    """Σ factor·matrix, exactly."""
    first = terms[0][1]
    return [
        [sum((factor * matrix[i][j] for factor, matrix in terms), Fraction(0)) for j in range(len(first[0]))]
        for i in range(len(first))
    ]


def base_tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Two layers of four matrices, an embedding, norms with a negative zero, and an integer buffer."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {"model.embed_tokens.weight": torch.randn(20, 12, generator=generator)}
    for layer in range(2):
        for name, shape in SHAPES.items():
            tensors[module(layer, name) + ".weight"] = torch.randn(shape, generator=generator) * 0.3
        tensors[f"model.layers.{layer}.norm.weight"] = torch.rand(12, generator=generator) + 0.5
    tensors["model.layers.0.norm.weight"][3] = -0.0
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    # A row of neighbours: with the update of `ties` each sum is halfway between two of them, or next to it.
    stored[module(1, "q_proj") + ".weight"] = (1 + torch.arange(144).reshape(12, 12) % 127 / 128).to(dtype)
    stored["model.positions"] = torch.arange(20)
    return stored


def module(layer: int, name: str) -> str:
    """Path of a module."""
    return f"model.layers.{layer}.{'mlp' if 'p_proj' in name or 'n_proj' in name else 'self_attn'}.{name}"


def adapter_tensors(seed: int = 1, ranks: Mapping[str, int] | None = None, *, ties: bool = True) -> Tensors:
    """Random factors for all eight matrices; with `ties`, one gives sums on and just below midpoints."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for layer in range(2):
        for name, (rows, columns) in SHAPES.items():
            path = module(layer, name)
            rank = (ranks or {}).get(path, 3)
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(
                rank, columns, generator=generator
            )
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    if ties:
        b, a = factors(tensors, module(1, "q_proj"))
        b.zero_(), a.zero_()
        b[:, :2], a[0] = 1, 2.0**-9
        # With s = 2 the update is half a bfloat16 ulp of 1…2, less a speck in every other column.
        a[1, 1::2] = -(2.0**-31)
    return tensors


def factors(tensors: Tensors, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A of a module."""
    prefix = f"base_model.model.{path}"
    return tensors[f"{prefix}.lora_B.weight"], tensors[f"{prefix}.lora_A.weight"]


def right_merge(
    base: Tensors,
    adapters: list[tuple[Tensors, Mapping[str, float] | float]],
    dtype: torch.dtype | None = None,
) -> Tensors:
    """W + Σ c·B·A, each element rounded once; c is one number, or one per module."""
    merged: Tensors = {}
    for name, tensor in base.items():
        wanted = (dtype or tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        path = name.removesuffix(".weight")
        terms = [
            (Fraction(scale if isinstance(scale, float) else scale[path]), product(*factors(tensors, path)))
            for tensors, scale in adapters
            if f"base_model.model.{path}.lora_A.weight" in tensors
        ]
        if terms:
            merged[name] = rounded(add((Fraction(1), fractions(tensor)), *terms), wanted)
        elif wanted != tensor.dtype:
            matrix = rounded(fractions(tensor.reshape(-1, 1)), wanted).reshape(tensor.shape)
            # Rational numbers know no negative zero; a cast keeps it.
            merged[name] = torch.where((tensor == 0) & tensor.signbit(), -0.0, matrix)
        else:
            merged[name] = tensor
    return merged


def write_model(folder: Path, tensors: Tensors, *, shards: int = 1, **config: Any) -> Path:
    """A model folder with its config and a stand-in for a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 12, **config}))
    (folder / "tokenizer.json").write_text("{}")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index_body = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_body))
    return folder


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """An adapter folder: r = 3, α = 6 unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(SHAPES), **config}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return folder
