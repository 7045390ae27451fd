"""Integers with a scale and a zero point per group: compressed-tensors, GPTQ (2210.17323), AWQ (2306.00978).

All three are value = (code − zero) · scale, which float64 holds, and differ in how they pack.

compressed-tensors `pack-quantized`: `X.weight_packed`, int32 words along a row of the weight, the first
code in the lowest bits, `X.weight_scale` [O, groups], `X.weight_shape`; `X.weight_zero_point` packed along
the rows of [O, groups], or half of the range where there is none; `X.weight_g_idx`, the group of each
input. Also `int-quantized`: `X.weight` int8 beside `X.weight_scale`.

GPTQ: `X.qweight` [I / 8, O], words along the inputs; `X.qzeros` [groups, O / 8], stored less one but in
`gptq_v2`; `X.scales` [groups, O]; `X.g_idx`, the group of each input, in any order with act-order.

AWQ: `X.qweight` [I, O / 8], words along the outputs in the order 0 2 4 6 1 3 5 7, and `X.qzeros` so too.

The libraries multiply in the type of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.checkpoint.model import Checkpoint
from lorasmith.quantized.grid import Array, Block, Codes, Ints, Levels
from lorasmith.quantized.small_floats import pack_nibbles, unpack_nibbles
from lorasmith.quantized.weight import Part, QuantizedWeight, optional, part, settings

LEVELS = {bits: Levels(tuple(float(code) for code in range(1 << bits))) for bits in (4, 8)}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each code of an AWQ word belongs to, from the lowest bits on."""

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SCALES = tuple(_TORCH)
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale")


@dataclass(frozen=True)
class IntegerWeight:
    """A weight in 4 or 8 bits."""

    name: str
    shape: tuple[int, ...]
    """[O, I]."""
    format: str
    parts: Mapping[str, Part]
    bits: int
    packing: Literal["rows", "bytes", "gptq", "awq"]
    zero_shift: int = 0
    """What is added to the stored zero points."""

    @property
    def unit(self) -> int:
        """All rows."""
        return self.shape[0]

    def block(self, start: int, stop: int) -> Block:
        """Codes and grid of some rows."""
        codes = self._codes(start, stop)
        groups = self._groups()
        scale, zero = self._scales(start, stop), self._zeros(start, stop)
        # One group over a row is broadcast instead of being spread out.
        if scale.shape[1] > 1:
            scale = scale[:, groups]
        if zero.shape[1] > 1:
            zero = zero[:, groups]
        return Block(LEVELS[self.bits], codes, scale, offset=-zero * scale)

    def encode(self, start: int, codes: Codes) -> bytes:
        """All codes, packed as they were."""
        match self.packing:
            case "bytes":
                return (codes ^ 0x80).tobytes()
            case "rows":
                per_word = 32 // self.bits
                padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
                return (padded if self.bits == 8 else pack_nibbles(padded)).tobytes()
            case "gptq":
                turned = np.ascontiguousarray(codes.T)
                # [I, O] → words along I: the bytes of a word stand in a row of their own.
                per_word = 32 // self.bits
                words = turned.reshape(-1, per_word, turned.shape[1]).transpose(0, 2, 1)
                words = np.ascontiguousarray(words)
                return (words if self.bits == 8 else pack_nibbles(words)).tobytes()
            case "awq":
                turned = np.ascontiguousarray(codes.T).reshape(codes.shape[1], -1, 8)
                return pack_nibbles(np.ascontiguousarray(turned[..., AWQ_ORDER])).tobytes()

    def library(self, start: int, stop: int) -> torch.Tensor:
        """(code − zero) · scale in the type of the scales."""
        dtype = _TORCH[self.parts["scale"].info.dtype]
        block = self.block(start, stop)
        scale = torch.from_numpy(np.broadcast_to(block.scale, block.codes.shape).copy()).to(dtype)
        groups, zero = self._groups(), self._zeros(start, stop)
        zero = zero[:, groups] if zero.shape[1] > 1 else zero
        return torch.from_numpy(block.codes.astype(np.float64) - zero).to(dtype) * scale

    def _codes(self, start: int, stop: int) -> Codes:
        inputs, stored = self.shape[1], self.parts["codes"]
        match self.packing:
            case "bytes":
                return stored.read(start * inputs, (stop - start) * inputs).view(np.uint8).reshape(
                    -1, inputs
                ) ^ np.uint8(0x80)
            case "rows":
                words = stored.info.shape[1]
                bytes_ = stored.read(start * words, (stop - start) * words).view(np.uint8)
                bytes_ = bytes_.reshape(stop - start, 4 * words)
                return (bytes_ if self.bits == 8 else unpack_nibbles(bytes_))[:, :inputs]
            case "gptq":
                packed = stored.kept().reshape(stored.info.shape)[:, start:stop]
                bytes_ = np.ascontiguousarray(packed).view(np.uint8).reshape(*packed.shape, 4)
                codes = bytes_ if self.bits == 8 else unpack_nibbles(bytes_)
                # [words, rows, codes of a word] → [rows, inputs]
                return np.ascontiguousarray(codes.transpose(1, 0, 2)).reshape(stop - start, -1)
            case "awq":
                packed = stored.kept().reshape(stored.info.shape)
                return np.ascontiguousarray(_awq(packed, start, stop).T)

    def _groups(self) -> Ints:
        """The group of each input."""
        if "g_idx" in self.parts:
            return self.parts["g_idx"].kept().astype(np.int64)
        count = self._across
        return np.arange(self.shape[1]) // -(-self.shape[1] // count)

    @property
    def _across(self) -> int:
        shape = self.parts["scale"].info.shape
        if self.packing in ("gptq", "awq"):
            return shape[0]
        return shape[1] if len(shape) > 1 else 1

    def _scales(self, start: int, stop: int) -> Array:
        """[rows, groups]."""
        stored, across = self.parts["scale"], self._across
        if self.packing in ("gptq", "awq"):
            whole = stored.scales().reshape(across, -1)
            return whole[:, start:stop].T.astype(np.float64)
        if stored.info.elements == 1:
            return stored.scales().astype(np.float64).reshape(1, 1)
        return stored.scales(start * across, (stop - start) * across).astype(np.float64).reshape(-1, across)

    def _zeros(self, start: int, stop: int) -> Array:
        """[rows, groups], counted as the codes are."""
        stored = self.parts.get("zero")
        half = 1 << (self.bits - 1)
        if stored is None:
            return np.full((1, 1), float(half))
        whole = stored.kept()
        if stored.info.dtype == "I8":
            zeros = whole.reshape(-1, 1) if len(stored.info.shape) < 2 else whole.reshape(stored.info.shape)
            return (zeros if len(zeros) == 1 else zeros[start:stop]).astype(np.float64) + half
        words = whole.reshape(stored.info.shape)
        match self.packing:
            case "awq":
                zeros = _awq(words, start, stop).T
            case "gptq":
                zeros = _along_rows(words, self.bits)[:, start:stop].T
            case _:
                zeros = _along_rows(np.ascontiguousarray(words.T), self.bits)[:, start:stop].T
        return zeros.astype(np.float64) + self.zero_shift


def _along_rows(words: npt.NDArray[np.int32], bits: int) -> Codes:
    """Codes of words that are packed along the last dimension."""
    bytes_ = np.ascontiguousarray(words).view(np.uint8)
    return bytes_ if bits == 8 else unpack_nibbles(bytes_)


def _awq(words: npt.NDArray[np.int32], start: int, stop: int) -> Codes:
    """Codes [rows, stop − start] of words that are packed in AWQ's order."""
    low, high = start // 8, -(-stop // 8)
    codes = _along_rows(words[:, low:high], 4).reshape(len(words), -1, 8)
    ordered = np.empty_like(codes)
    ordered[..., AWQ_ORDER] = codes
    return ordered.reshape(len(words), -1)[:, start - 8 * low : stop - 8 * low]


class CompressedIntegers:
    """compressed-tensors, packed or in int8."""

    name = "compressed-tensors integers"

    def find(self, stored: Checkpoint) -> list[QuantizedWeight]:
        """Every packed weight, and every int8 weight with `weight_scale`."""
        found: list[QuantizedWeight] = []
        for name, info in stored.tensors.items():
            module = name.removesuffix(".weight_packed")
            if module != name and info.dtype == "I32":
                found.append(_packed(stored, module))
            module = name.removesuffix(".weight")
            if module != name and info.dtype == "I8" and f"{module}.weight_scale" in stored.tensors:
                parts = _beside(stored, module, name)
                found.append(_checked(IntegerWeight(name, info.shape, "int8-bytes", parts, 8, "bytes")))
        return found


def _beside(stored: Checkpoint, module: str, codes: str) -> dict[str, Part]:
    name = f"{module}.weight"
    parts = {
        "codes": part(stored, codes, ("I32", "I8"), name),
        "scale": part(stored, f"{module}.weight_scale", _SCALES, name),
        **optional(stored, module, _ACTIVATIONS),
    }
    for role, leaf in (("zero", "weight_zero_point"), ("g_idx", "weight_g_idx"), ("shape", "weight_shape")):
        if f"{module}.{leaf}" in stored.tensors:
            parts[role] = part(stored, f"{module}.{leaf}", ("I8", "I32", "I64"), name)
    return parts


def _packed(stored: Checkpoint, module: str) -> IntegerWeight:
    parts = _beside(stored, module, f"{module}.weight_packed")
    shape_part = part(stored, f"{module}.weight_shape", ("I32", "I64"), f"{module}.weight")
    shape = tuple(int(extent) for extent in shape_part.read())
    codes = parts["codes"].info.shape
    fitting = [
        bits
        for bits in LEVELS
        if len(shape) == 2 == len(codes) and shape[0] == codes[0] and -(-shape[1] * bits // 32) == codes[1]
    ]
    if len(fitting) != 1:
        raise parts["codes"].refuse(f"its shape is {list(codes)}", f"4 or 8 bits each of {list(shape)}")
    format_ = f"int{fitting[0]}-packed"
    return _checked(IntegerWeight(f"{module}.weight", shape, format_, parts, fitting[0], "rows"))


def _checked(weight: IntegerWeight) -> IntegerWeight:
    """The weight; `CheckpointError` where scales, zeros and groups do not fit its shape."""
    outputs, inputs = weight.shape
    scale, across = weight.parts["scale"], weight._across
    turned = weight.packing in ("gptq", "awq")
    wanted = outputs * across
    if scale.info.elements not in ((wanted,) if turned else (1, wanted)) or across > inputs or not across:
        raise scale.refuse(
            f"its shape is {list(scale.info.shape)}", f"a scale per group of {[outputs, inputs]}"
        )
    if "g_idx" in weight.parts:
        groups = weight.parts["g_idx"].read()
        if len(groups) != inputs or groups.min(initial=0) < 0 or groups.max(initial=0) >= across:
            raise weight.parts["g_idx"].refuse("it does not fit", f"a group below {across} per input")
    elif inputs % across:
        raise scale.refuse(f"{across} groups do not divide {inputs} inputs", "groups of one size")
    if "zero" in weight.parts:
        _check_zeros(weight, outputs, across)
    return weight


def _check_zeros(weight: IntegerWeight, outputs: int, across: int) -> None:
    zero = weight.parts["zero"]
    words = -(-outputs * weight.bits // 32)
    fitting: tuple[tuple[int, ...], ...] = ((words, across),)
    if weight.packing in ("gptq", "awq"):
        fitting = ((across, words),)
    elif zero.info.dtype == "I8":
        fitting = ((outputs, across), (outputs,), (1,), (1, 1), ())
    if zero.info.shape not in fitting:
        raise zero.refuse(f"its shape is {list(zero.info.shape)}", f"{list(fitting[0])}")


class Gptq:
    """GPTQ, both versions."""

    name = "gptq"

    def find(self, stored: Checkpoint) -> list[QuantizedWeight]:
        """Every `qweight` of a base that GPTQ has quantized."""
        if settings(stored).get("quant_method") not in ("gptq", "auto-round", "auto_round"):
            return []
        version = settings(stored).get("checkpoint_format", "gptq")
        shift = 0 if version == "gptq_v2" else 1
        return [_turned(stored, name, "gptq", shift) for name in _qweights(stored)]


class Awq:
    """AWQ as its `gemm` version packs it."""

    name = "awq"

    def find(self, stored: Checkpoint) -> list[QuantizedWeight]:
        """Every `qweight` of a base that AWQ has quantized."""
        if settings(stored).get("quant_method") != "awq":
            return []
        version = str(settings(stored).get("version", "gemm")).lower()
        names = _qweights(stored)
        if names and version != "gemm":
            found = part(stored, f"{names[0]}.qweight", ("I32",), names[0])
            raise found.refuse(
                f"the config's version is {version!r}", "'gemm', the one that models are shared in"
            )
        return [_turned(stored, name, "awq", 0) for name in names]


def _qweights(stored: Checkpoint) -> list[str]:
    return [name.removesuffix(".qweight") for name in stored.tensors if name.endswith(".qweight")]


def _turned(stored: Checkpoint, module: str, packing: Literal["gptq", "awq"], shift: int) -> IntegerWeight:
    name = f"{module}.weight"
    parts = {
        "codes": part(stored, f"{module}.qweight", ("I32",), name),
        "zero": part(stored, f"{module}.qzeros", ("I32",), name),
        "scale": part(stored, f"{module}.scales", _SCALES, name),
    }
    if f"{module}.g_idx" in stored.tensors:
        parts["g_idx"] = part(stored, f"{module}.g_idx", ("I32", "I64"), name)
    bits = settings(stored).get("bits", settings(stored).get("w_bit", 4))
    codes, scales = parts["codes"].info.shape, parts["scale"].info.shape
    if bits not in ((4,) if packing == "awq" else LEVELS) or len(codes) != 2 or len(scales) != 2:
        raise parts["codes"].refuse(
            f"the config says {bits!r} bits, its shape is {list(codes)}", "4 or 8 bits"
        )
    per_word = 32 // bits
    shape = (codes[1], codes[0] * per_word) if packing == "gptq" else (codes[1] * per_word, codes[0])
    if scales[1] != shape[0]:
        raise parts["scale"].refuse(f"its shape is {list(scales)}", f"[groups, {shape[0]}]")
    return _checked(IntegerWeight(name, shape, packing, parts, bits, packing, shift))
