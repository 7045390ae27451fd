"""Integers with scale and zero point: compressed-tensors, GPTQ and AWQ, by shifts of whole words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lorasmith.proving.weights.model_folder import ProvenTensor
from lorasmith.proving.weights.quantized.stored import Elements, Found, companion, kept

_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale")
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where in a word of AWQ the codes of eight outputs stand, in the order of the outputs."""


def find_compressed(tensors: Mapping[str, ProvenTensor], config: Mapping[str, Any]) -> list[Found]:
    """`weight_packed` in int32, or `weight` in int8, with `weight_scale`."""
    found = []
    for name, codes in tensors.items():
        module, _, leaf = name.rpartition(".")
        packed = leaf == "weight_packed" and codes.dtype == "I32"
        if not packed and not (
            leaf == "weight" and codes.dtype == "I8" and f"{module}.weight_scale" in tensors
        ):
            continue
        own = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", *_ACTIVATIONS)
        beside = {one: tensors[f"{module}.{one}"] for one in own if f"{module}.{one}" in tensors}
        companion(tensors, f"{module}.weight_scale", module)
        shape = codes.shape
        if packed:
            rows, columns = companion(tensors, f"{module}.weight_shape", module).whole().tolist()
            shape = (rows, columns)
        bits = 4 if packed and codes.shape[1] == -(-shape[1] // 8) else 8
        kind = f"int{bits}-packed" if packed else "int8-bytes"
        used = (name, *(one.name for one in beside.values()))
        read = _compressed(codes, beside, shape, bits)
        levels = torch.arange(1 << bits, dtype=torch.float64)
        found.append(Found(f"{module}.weight", shape, kind, codes, levels, read, used))
    return found


def _compressed(
    codes: ProvenTensor, beside: Mapping[str, ProvenTensor], shape: tuple[int, ...], bits: int
) -> Callable[[int, int], Elements]:
    scale, columns = beside["weight_scale"], shape[1]
    groups = scale.shape[1] if len(scale.shape) > 1 else 1
    stored = beside["weight_g_idx"].whole().long() if "weight_g_idx" in beside else None
    group_of = stored if stored is not None else torch.arange(columns) // (columns // groups)
    packed, half = codes.dtype == "I32", 1 << (bits - 1)
    zero = _zero_points(beside.get("weight_zero_point"), shape[0], bits)

    def read(first: int, count: int) -> Elements:
        place = torch.arange(first, first + count)
        row, column = place // columns, place % columns
        low, high = int(row[0]), int(row[-1]) + 1
        if packed:
            words = codes.rows((slice(low, high),)).long() & 0xFFFFFFFF
            per_word = 32 // bits
            code = words[row - low, column // per_word] >> (column % per_word * bits) & ((1 << bits) - 1)
        else:
            code = codes.flat(first, count).long() + half
        group = group_of[column]
        if scale.elements == 1:
            factor = scale.whole().reshape(-1).double().expand(count)
        else:
            factor = scale.rows((slice(low, high),)).double().reshape(-1, groups)[row - low, group]
        middle = torch.full_like(code, half)
        if zero is not None:
            middle += zero[row if len(zero) > 1 else 0, group if zero.shape[1] > 1 else 0]
        return Elements(code, factor, -middle.double() * factor)

    return read


def _zero_points(stored: ProvenTensor | None, rows: int, bits: int) -> torch.Tensor | None:
    """[rows, groups], signed as the codes are."""
    if stored is None:
        return None
    values = stored.whole().long()
    if stored.dtype == "I8":
        return values.reshape(-1, values.shape[1] if values.ndim > 1 else 1)
    shifts = torch.arange(0, 32, bits)
    unpacked = (values[:, None, :] >> shifts[None, :, None]) & ((1 << bits) - 1)
    return unpacked.reshape(-1, values.shape[1])[:rows] - (1 << (bits - 1))


def find_qweight(tensors: Mapping[str, ProvenTensor], config: Mapping[str, Any]) -> list[Found]:
    """GPTQ and AWQ, told apart by the config."""
    quantization = config.get("quantization_config") or {}
    method = str(quantization.get("quant_method", ""))
    found = []
    for name, codes in tensors.items():
        module = name.removesuffix(".qweight")
        if module == name:
            continue
        zeros, scales = (companion(tensors, f"{module}.{leaf}", module) for leaf in ("qzeros", "scales"))
        bits = int(quantization.get("bits", quantization.get("w_bit", 4)))
        used = [name, zeros.name, scales.name]
        group_of = None
        if f"{module}.g_idx" in tensors:
            group_of = tensors[f"{module}.g_idx"].whole().long()
            used.append(f"{module}.g_idx")
        awq = method == "awq"
        outputs = scales.shape[1]
        inputs = codes.shape[0] if awq else codes.shape[0] * 32 // bits
        if group_of is None:
            group_of = torch.arange(inputs) // (inputs // scales.shape[0])
        shifts = torch.tensor(_AWQ_SHIFTS) if awq else torch.arange(0, 32, bits)
        plus = 0 if awq or quantization.get("checkpoint_format") == "gptq_v2" else 1
        whole = _Turned(codes, zeros, scales, group_of, shifts, (1 << bits) - 1, plus, awq)
        kind = "awq" if awq else "gptq"
        levels = torch.arange(1 << bits, dtype=torch.float64)
        shape = (outputs, inputs)
        found.append(Found(f"{module}.weight", shape, kind, codes, levels, whole.read, tuple(used)))
    return found


class _Turned:
    """A weight that is stored by inputs, [I, O]: rows of the model are columns here."""

    def __init__(
        self,
        codes: ProvenTensor,
        zeros: ProvenTensor,
        scales: ProvenTensor,
        group_of: torch.Tensor,
        shifts: torch.Tensor,
        mask: int,
        plus: int,
        awq: bool,
    ) -> None:
        self.codes, self.zeros, self.scales = codes, zeros, scales
        self.group_of, self.shifts, self.mask, self.plus, self.awq = group_of, shifts, mask, plus, awq

    def read(self, first: int, count: int) -> Elements:
        """Some elements of [O, I]."""
        inputs, per_word = len(self.group_of), len(self.shifts)
        low, high = first // inputs, (first + count - 1) // inputs + 1
        output = torch.arange(low, high)
        words = kept(self.codes)
        if self.awq:
            codes = (words[:, output // per_word].long() >> self.shifts[output % per_word]) & self.mask
        else:
            picked = words[:, output].long()
            codes = ((picked[:, None, :] >> self.shifts[None, :, None]) & self.mask).reshape(inputs, -1)
        zeros = kept(self.zeros)[:, output // per_word].long() >> self.shifts[output % per_word]
        zeros = (zeros & self.mask) + self.plus
        scales = kept(self.scales)[:, output].double()
        scale = scales[self.group_of]
        parts = (codes, scale, -zeros[self.group_of].double() * scale)
        skipped = first - low * inputs
        code, factor, shift = (part.T.reshape(-1)[skipped:][:count] for part in parts)
        return Elements(code, factor, shift)
