"""bitsandbytes: NF4 and FP4 (arXiv 2305.14314), and LLM.int8 (arXiv 2208.07339)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lorasmith.errors import CheckpointError
from lorasmith.parsing import parse_json
from lorasmith.proving.weights.model_folder import ProvenTensor
from lorasmith.proving.weights.quantized.stored import Elements, Found, companion, nibble

_MARK = ".quant_state.bitsandbytes__"


def find_4bit(tensors: Mapping[str, ProvenTensor], config: Mapping[str, Any]) -> list[Found]:
    """Weights with a quant state."""
    return [_weight_4bit(tensors, name) for name in tensors if _MARK in name]


def _weight_4bit(tensors: Mapping[str, ProvenTensor], state_name: str) -> Found:
    name, _, kind = state_name.partition(_MARK)
    state = parse_json(bytes(tensors[state_name].whole().tolist()))
    roles = ["absmax", "quant_map"] + (
        ["nested_absmax", "nested_quant_map"] if "nested_blocksize" in state else []
    )
    parts = {role: companion(tensors, f"{name}.{role}", name) for role in roles}
    codes = companion(tensors, name, name)
    table = parts["quant_map"].whole()
    if not torch.allclose(table.double(), _published(kind), rtol=0, atol=2e-4):
        raise CheckpointError(
            f"{name}: its table of 16 values is not that of {kind}",
            where=codes.file,
            expected="the format's own",
        )
    scales = _scales(parts, state)
    size = int(state["blocksize"])

    def read(first: int, count: int) -> Elements:
        element = torch.arange(first, first + count)
        low = first // size
        scale = scales(low, (first + count - 1) // size - low + 1)[element // size - low]
        return Elements(nibble(codes, element, high_first=True), scale.double())

    used = (state_name, name, *(f"{name}.{role}" for role in roles))
    return Found(name, tuple(state["shape"]), kind, codes, table.double(), read, used)


def _scales(
    parts: Mapping[str, ProvenTensor], state: Mapping[str, Any]
) -> Callable[[int, int], torch.Tensor]:
    """The float32 scales of some blocks; with double quantization in the library's two roundings."""
    if "nested_blocksize" not in state:
        return parts["absmax"].flat
    table, outer = parts["nested_quant_map"].whole(), parts["nested_absmax"].whole()
    size, offset = int(state["nested_blocksize"]), torch.tensor(state["nested_offset"], dtype=torch.float32)

    def nested(first: int, count: int) -> torch.Tensor:
        code = parts["absmax"].flat(first, count).long()
        return table[code].mul(outer[torch.arange(first, first + count) // size]).add(offset)

    return nested


def _published(kind: str) -> torch.Tensor:
    """The 16 values: NF4 by its definition over the normal distribution's quantiles, FP4 as thirds."""
    if kind == "fp4":
        half = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], dtype=torch.float64)
        return torch.cat([half, -half])
    edge = 0.9677083
    above = torch.special.ndtri(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    return values / values.max()


def find_8bit(tensors: Mapping[str, ProvenTensor], config: Mapping[str, Any]) -> list[Found]:
    """int8 weights with a scale per row: code · SCB / 127, the quotient rounded once."""
    found = []
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "SCB":
            weight = f"{module}.weight"
            codes, scb = companion(tensors, weight, weight), tensors[name]
            used = [weight, name] + [one for one in (f"{module}.weight_format",) if one in tensors]
            # Bytes in two's complement: 0 … 127, then -128 … -1.
            levels = torch.arange(256, dtype=torch.float64).add(128).remainder(256).sub(128)
            read = _int8(codes, scb)
            found.append(Found(weight, codes.shape, "int8", codes, levels, read, tuple(used), divisor=127))
    return found


def _int8(codes: ProvenTensor, scb: ProvenTensor) -> Callable[[int, int], Elements]:
    def read(first: int, count: int) -> Elements:
        row = torch.arange(first, first + count) // codes.columns
        low, high = int(row[0]), int(row[-1])
        scale = scb.flat(low, high - low + 1).double()[row - low]
        return Elements(codes.flat(first, count).view(torch.uint8).long(), scale)

    return read
