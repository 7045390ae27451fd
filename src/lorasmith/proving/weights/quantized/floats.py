"""FP8 and the four-bit floats: DeepSeek's and compressed-tensors' FP8, gpt-oss' MXFP4, NVFP4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch

from lorasmith.proving.weights.model_folder import ProvenTensor
from lorasmith.proving.weights.quantized.stored import Elements, Found, companion, kept, nibble

_ACTIVATIONS = ("input_scale", "activation_scale", "input_zero_point", "input_global_scale")
_FP4 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.float64) / 2
_FP4 = torch.cat([_FP4, -_FP4])


def _beside(tensors: Mapping[str, ProvenTensor], module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{leaf}" for leaf in _ACTIVATIONS if f"{module}.{leaf}" in tensors)


_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)


def e4m3(stored: torch.Tensor) -> torch.Tensor:
    """The numbers of bytes in OFP8 e4m3."""
    return stored.view(torch.float8_e4m3fn).to(torch.float64)


def find_fp8(tensors: Mapping[str, ProvenTensor], config: Mapping[str, Any]) -> list[Found]:
    """FP8 with `…_scale_inv` or `…weight_scale`: a scale per tensor, row, or block."""
    found = []
    for name, codes in tensors.items():
        for suffix, kind in (("_scale_inv", "fp8-block"), ("_scale", "fp8")):
            scale = tensors.get(name + suffix)
            if codes.dtype == "F8_E4M3" and scale is not None and len(codes.shape) > 1:
                size = _block_size(config, suffix)
                used = (name, name + suffix, *_beside(tensors, name.removesuffix(".weight")))
                found.append(Found(name, codes.shape, kind, codes, _E4M3, _blocks(codes, scale, size), used))
                break
    return found


def _block_size(config: Mapping[str, Any], suffix: str) -> tuple[int, int]:
    quantization = config.get("quantization_config") or {}
    if suffix == "_scale_inv":
        size = quantization.get("weight_block_size")
    else:
        groups = (quantization.get("config_groups") or {}).values()
        sizes = [(group.get("weights") or {}).get("block_structure") for group in groups]
        size = next((one for one in reversed(sizes) if one), None)
    height, width = size or (128, 128)
    return int(height), int(width)


def _blocks(
    codes: ProvenTensor, scale: ProvenTensor, size: tuple[int, int]
) -> Callable[[int, int], Elements]:
    rows, columns = codes.shape[-2:]
    height, width = size
    if scale.elements == 1:
        height, width = rows * prod(codes.shape[:-2]), columns
    elif scale.elements == codes.elements // columns and scale.shape[-1] in (1, rows):
        height, width = 1, columns
    down, across = max(1, -(-rows // height)), -(-columns // width)

    def read(first: int, count: int) -> Elements:
        place = torch.arange(first, first + count)
        row, column = place // columns, place % columns
        expert = row // rows if scale.elements > 1 else torch.zeros_like(row)
        block = (expert * down + (row - expert * rows) // height) * across + column // width
        low, high = int(block.min()), int(block.max())
        here = scale.flat(low, high - low + 1).double()[block - low]
        return Elements(codes.flat(first, count).long(), here)

    return read


def find_mxfp4(tensors: Mapping[str, ProvenTensor], config: Mapping[str, Any]) -> list[Found]:
    """gpt-oss: [E, O, groups, 16] and [E, O, groups] are [E, groups · 32, O] in the model."""
    found = []
    for name, blocks in tensors.items():
        if name.endswith("_blocks") and len(blocks.shape) == 4:
            stack = name.removesuffix("_blocks")
            scales = companion(tensors, f"{stack}_scales", stack)
            experts, outputs, groups, _ = blocks.shape
            shape = (experts, groups * 32, outputs)
            read = _mxfp4(blocks, scales, shape)
            found.append(Found(stack, shape, "mxfp4", blocks, _FP4, read, (name, f"{stack}_scales")))
    return found


def _mxfp4(
    blocks: ProvenTensor, scales: ProvenTensor, shape: tuple[int, ...]
) -> Callable[[int, int], Elements]:
    _, inputs, outputs = shape

    def rows(number: int, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of some rows of an expert, which are columns of what is stored."""
        bytes_, groups = outputs * inputs // 2, outputs * inputs // 32
        packed = kept(blocks, number * bytes_, bytes_).reshape(outputs, inputs // 2)
        place = torch.arange(low, high)
        both = packed[:, place // 2].long()
        codes = torch.where(place % 2 == 0, both % 16, both // 16)
        stored = kept(scales, number * groups, groups).reshape(outputs, -1)[:, place // 32].double()
        powers = torch.where(stored == 255, torch.nan, torch.pow(2.0, stored - 127))
        return codes.T.reshape(-1), powers.T.reshape(-1)

    def read(first: int, count: int) -> Elements:
        begin, end = first // outputs, (first + count - 1) // outputs + 1
        parts = []
        for number in range(begin // inputs, (end - 1) // inputs + 1):
            start = number * inputs
            parts.append(rows(number, max(begin - start, 0), min(end - start, inputs)))
        skipped = first - begin * outputs
        code, scale = (torch.cat(both)[skipped:][:count] for both in zip(*parts, strict=True))
        return Elements(code, scale)

    return read


def find_nvfp4(tensors: Mapping[str, ProvenTensor], config: Mapping[str, Any]) -> list[Found]:
    """compressed-tensors divides by the scale over all (in float32), ModelOpt multiplies with it."""
    found = []
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        stored = {"weight_global_scale": "weight_packed", "weight_scale_2": "weight"}.get(leaf)
        codes = tensors.get(f"{module}.{stored}") if stored else None
        if codes is not None and codes.dtype == "U8":
            scale = companion(tensors, f"{module}.weight_scale", module)
            shape = (codes.shape[0], 2 * codes.shape[1])
            read = _nvfp4(codes, scale, tensors[name], divides=leaf == "weight_global_scale")
            used = (codes.name, scale.name, name, *_beside(tensors, module))
            found.append(Found(f"{module}.weight", shape, "nvfp4", codes, _FP4, read, used))
    return found


def _nvfp4(
    codes: ProvenTensor, scale: ProvenTensor, over_all: ProvenTensor, *, divides: bool
) -> Callable[[int, int], Elements]:
    factor = over_all.whole().reshape(-1)[0]

    def read(first: int, count: int) -> Elements:
        place = torch.arange(first, first + count)
        low = first // 16
        small = e4m3(scale.flat(low, (first + count - 1) // 16 - low + 1))
        group = (small.float() / factor).double() if divides else small * factor.double()
        return Elements(nibble(codes, place, high_first=False), group[place // 16 - low])

    return read
