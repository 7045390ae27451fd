"""A case per format: a weight quantized by its own library, and what that library makes of it again.

A row each: to add a format, add a function and name it in `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
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
    file: Callable[[Path], None] | None = None
    """Writes the folder's weights where they are no safetensors."""


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


def fp8_block(scale_type: torch.dtype) -> Callable[[torch.Tensor], Made]:
    """DeepSeek's and Qwen3's: a scale per block, here of 8 × 64 so that a small weight has several."""

    def make(weight: torch.Tensor) -> Made:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        rows, columns = weight.shape
        blocks = weight.reshape(rows // 8, 8, columns // 64, 64)
        scale = (blocks.abs().amax(dim=(1, 3)).clamp(min=1e-6) / 448).to(scale_type)
        codes = (blocks / scale.float()[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors = {NAME: codes.reshape(rows, columns), f"{NAME}_scale_inv": scale}
        dequantize = Fp8Dequantize(None)._dequantize_one
        reference = dequantize(tensors[NAME], scale, output_dtype=torch.bfloat16)
        return Made(tensors, reference, {"quant_method": "fp8", "weight_block_size": [8, 64]})

    return make


def fp8_edges(weight: torch.Tensor) -> Made:
    """Blocks that the edges cut: transformers refuses these, so the formula is written out."""
    rows, columns = weight.shape
    height, wide = 10, 48
    row, column = torch.arange(rows) // height, torch.arange(columns) // wide
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(int(row[-1]) + 1, int(column[-1]) + 1, generator=generator) * 0.01 + 1e-3
    spread = scale[row][:, column]
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    tensors = {NAME: codes, f"{NAME}_scale_inv": scale}
    reference = (codes.float() * spread).to(torch.bfloat16)
    return Made(tensors, reference, {"quant_method": "fp8", "weight_block_size": [height, wide]})


def compressed(
    preset: dict[str, Any], scale_type: torch.dtype = torch.bfloat16, *, asymmetric: bool = False
) -> Callable[[torch.Tensor], Made]:
    """compressed-tensors: its own observer's scales, its own compressor and decompressor."""

    def make(weight: torch.Tensor) -> Made:
        from compressed_tensors.compressors.base import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        settings = dict(preset)
        kind = settings.pop("format")
        arguments = QuantizationArgs(**settings, symmetric=not asymmetric)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        state = {"weight": weight.to(torch.bfloat16).float()}
        rows, columns = weight.shape
        match arguments.strategy:
            case "tensor":
                parts, shape = weight.reshape(1, -1), (1,)
            case "channel":
                parts, shape = weight, (rows, 1)
            case "block":
                height, wide = arguments.block_structure
                parts = weight.reshape(rows // height, height, columns // wide, wide).permute(0, 2, 1, 3)
                shape = (rows // height, columns // wide)
                parts = parts.reshape(rows // height * columns // wide, -1)
            case _:
                parts = weight.reshape(-1, arguments.group_size)
                shape = (rows, columns // arguments.group_size)
        low, high = parts.amin(dim=1).reshape(shape), parts.amax(dim=1).reshape(shape)
        if kind == "nvfp4-pack-quantized":
            state["weight_global_scale"] = generate_gparam(low.min(), high.max()).reshape(1).float()
        scale, zero = calculate_qparams(low, high, arguments, global_scale=state.get("weight_global_scale"))
        state["weight_scale"] = scale if kind == "nvfp4-pack-quantized" else scale.to(scale_type)
        if asymmetric:
            state["weight_zero_point"] = zero.to(torch.int8)
        compressor = BaseCompressor.get_value_from_registry(kind)
        stored = compressor.compress(state, scheme)
        reference = compressor.decompress(dict(stored), scheme)["weight"]
        group = {"weights": arguments.model_dump(mode="json"), "targets": ["Linear"]}
        config = {
            "quant_method": "compressed-tensors",
            "format": kind,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
        tensors = {f"{MODULE}.{leaf}": part for leaf, part in stored.items()}
        return Made(tensors, reference.detach(), config)

    return make


def nvfp4_modelopt(weight: torch.Tensor) -> Made:
    """ModelOpt's spelling, by the converter of compressed-tensors the other way round."""
    made = compressed(NVFP4)(weight)
    tensors = {
        NAME: made.tensors[f"{MODULE}.weight_packed"],
        f"{MODULE}.weight_scale": made.tensors[f"{MODULE}.weight_scale"],
        f"{MODULE}.weight_scale_2": 1 / made.tensors[f"{MODULE}.weight_global_scale"].reshape(()),
        f"{MODULE}.input_scale": torch.tensor(0.01),
    }
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    back = ModelOptNvfp4Converter(targets=["re:.*q_proj"]).process(dict(tensors))
    settings = {key: value for key, value in NVFP4.items() if key != "format"}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings, symmetric=True))
    compressor = BaseCompressor.get_value_from_registry(NVFP4["format"])
    state = {name.removeprefix(f"{MODULE}."): part for name, part in back.items()}
    state["weight_global_scale"] = state["weight_global_scale"].reshape(1)
    reference = compressor.decompress(state, scheme)["weight"].detach()
    return Made(tensors, reference, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


def mxfp4_experts(weight: torch.Tensor) -> Made:
    """gpt-oss' experts: [E, O, groups, 16] blocks, random codes, dequantized by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(int(weight.sum().abs() * 1000) % 1000)
    shape = (2, rows // 2, columns // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 124, shape, generator=generator, dtype=torch.uint8)
    scales[0, 0, 0], scales[0, 0, 1] = 0, 200
    name = "model.layers.0.mlp.experts.gate_up_proj"
    reference = convert_moe_packed_tensors(blocks.clone(), scales.clone())
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return Made(tensors, reference, {"quant_method": "mxfp4"}, name)


def gptq(bits: int, *, act_order: bool = False, version: str = "gptq") -> Callable[[torch.Tensor], Made]:
    """GPTQ: no library of it runs here, so packing and formula are those of AutoGPTQ's `qlinear` (v1: zeros
    are stored less one) and GPTQModel's (v2), written out element by element."""

    def make(weight: torch.Tensor) -> Made:
        outputs, inputs = weight.shape
        size, per_word = 32, 32 // bits
        generator = torch.Generator().manual_seed(bits)
        group = torch.arange(inputs) // size
        if act_order:
            group = group[torch.randperm(inputs, generator=generator)]
        groups = inputs // size
        scales = (torch.rand(groups, outputs, generator=generator) * 0.01 + 1e-3).to(torch.float16)
        zeros = torch.randint(1, 1 << bits, (groups, outputs), generator=generator)
        codes = torch.round(weight.T / scales.float()[group] + zeros[group]).clamp(0, (1 << bits) - 1).long()
        stored = zeros - (0 if version == "gptq_v2" else 1)
        qweight = torch.zeros(inputs // per_word, outputs, dtype=torch.int64)
        qzeros = torch.zeros(groups, outputs // per_word, dtype=torch.int64)
        for i in range(inputs):
            qweight[i // per_word] |= codes[i] << (bits * (i % per_word))
        for o in range(outputs):
            qzeros[:, o // per_word] |= stored[:, o] << (bits * (o % per_word))
        tensors = {
            f"{MODULE}.qweight": _signed(qweight),
            f"{MODULE}.qzeros": _signed(qzeros),
            f"{MODULE}.scales": scales,
            f"{MODULE}.g_idx": group.to(torch.int32),
        }
        reference = (scales[group] * (codes - zeros[group]).to(torch.float16)).T.contiguous()
        return Made(tensors, reference, {"quant_method": "gptq", "bits": bits, "checkpoint_format": version})

    return make


def awq(weight: torch.Tensor) -> Made:
    """AWQ's `gemm` packing (AutoAWQ, `WQLinear_GEMM.from_linear`), written out element by element."""
    outputs, inputs = weight.shape
    size, order = 32, [0, 2, 4, 6, 1, 3, 5, 7]
    generator = torch.Generator().manual_seed(5)
    group = torch.arange(inputs) // size
    scales = (torch.rand(inputs // size, outputs, generator=generator) * 0.01 + 1e-3).to(torch.float16)
    zeros = torch.randint(0, 16, (inputs // size, outputs), generator=generator)
    codes = torch.round(weight.T / scales.float()[group] + zeros[group]).clamp(0, 15).long()
    packed = []
    for values in (codes, zeros):
        words = torch.zeros(values.shape[0], outputs // 8, dtype=torch.int64)
        for column in range(outputs // 8):
            for i, place in enumerate(order):
                words[:, column] |= values[:, column * 8 + place] << (i * 4)
        packed.append(_signed(words))
    tensors = {f"{MODULE}.qweight": packed[0], f"{MODULE}.qzeros": packed[1], f"{MODULE}.scales": scales}
    reference = (scales[group] * (codes - zeros[group]).to(torch.float16)).T.contiguous()
    return Made(tensors, reference, {"quant_method": "awq", "bits": 4, "version": "gemm"})


def _signed(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def gguf(kind: str, architecture: str = "qwen2") -> Callable[[torch.Tensor], Made]:
    """A GGUF file with one matrix: quantized by gguf-py where it can, else random blocks."""

    def make(weight: torch.Tensor) -> Made:
        import gguf as library

        number = getattr(library.GGMLQuantizationType, kind)
        try:
            raw = library.quantize(weight.numpy(), number)
        except NotImplementedError:
            raw = random_blocks(kind, weight.shape)
        values = torch.from_numpy(library.dequantize(raw, number))
        heads = 4

        def write(folder: Path) -> None:
            write_gguf(folder / "model.gguf", {"blk.0.attn_q.weight": (raw, kind)}, architecture, heads)

        if architecture == "llama":
            rows, columns = values.shape
            values = (
                values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
            )
        return Made({}, values.contiguous(), file=write)

    return make


def random_blocks(kind: str, shape: tuple[int, ...]) -> Any:
    """Random bytes of a block type, its float16 scales of a sensible size."""
    import gguf as library

    size, width = library.GGML_QUANT_SIZES[getattr(library.GGMLQuantizationType, kind)]
    halves = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    generator = np.random.default_rng(7)
    raw = generator.integers(0, 256, (shape[0], shape[1] // size, width), dtype=np.uint8)
    for at in halves:
        scales = generator.normal(0, 1e-3, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def write_gguf(
    path: Path,
    tensors: dict[str, tuple[Any, str]],
    architecture: str,
    heads: int,
    kv_heads: int | None = None,
    **sizes: int,
) -> None:
    """A GGUF file by the library's own writer; arrays in float32 (`F32`) or raw blocks of a type."""
    import gguf as library

    writer = library.GGUFWriter(path, architecture)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads or heads)
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for name, size in sizes.items():
        writer.add_uint32(f"{architecture}.{name}", size)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=getattr(library.GGMLQuantizationType, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


NVFP4 = {
    "format": "nvfp4-pack-quantized",
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
}
PACKED = {"format": "pack-quantized", "type": "int"}
FP8 = {"format": "float-quantized", "num_bits": 8, "type": "float"}

CASES: dict[str, Callable[[torch.Tensor], Made]] = {
    "nf4": bitsandbytes_4bit("nf4", nested=False),
    "nf4 nested": bitsandbytes_4bit("nf4", nested=True),
    "nf4 nested float16": bitsandbytes_4bit("nf4", nested=True, dtype=torch.float16),
    "nf4 across rows": bitsandbytes_4bit("nf4", nested=True),
    "fp4": bitsandbytes_4bit("fp4", nested=False, dtype=torch.float32),
    "fp4 nested": bitsandbytes_4bit("fp4", nested=True),
    "int8": llm_int8,
    "fp8 block": fp8_block(torch.float32),
    "fp8 block bfloat16": fp8_block(torch.bfloat16),
    "fp8 edges": fp8_edges,
    "fp8 tensor": compressed({**FP8, "strategy": "tensor"}),
    "fp8 channel": compressed({**FP8, "strategy": "channel"}),
    "fp8 channel float32": compressed({**FP8, "strategy": "channel"}, torch.float32),
    "fp8 compressed block": compressed({**FP8, "strategy": "block", "block_structure": [8, 64]}),
    "mxfp4": mxfp4_experts,
    "nvfp4": compressed(NVFP4),
    "nvfp4 modelopt": nvfp4_modelopt,
    "int4 groups": compressed({**PACKED, "num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4 groups float16": compressed(
        {**PACKED, "num_bits": 4, "strategy": "group", "group_size": 32}, torch.float16
    ),
    "int4 asymmetric": compressed(
        {**PACKED, "num_bits": 4, "strategy": "group", "group_size": 32}, asymmetric=True
    ),
    "int4 channel": compressed({**PACKED, "num_bits": 4, "strategy": "channel"}),
    "int8 channel": compressed({**PACKED, "num_bits": 8, "strategy": "channel"}),
    "int8 asymmetric": compressed({**PACKED, "num_bits": 8, "strategy": "channel"}, asymmetric=True),
    "int8 bytes": compressed({**PACKED, "format": "int-quantized", "num_bits": 8, "strategy": "channel"}),
    "gptq": gptq(4),
    "gptq act-order": gptq(4, act_order=True),
    "gptq 8 bits": gptq(8),
    "gptq v2": gptq(4, version="gptq_v2"),
    "awq": awq,
    "gguf q8_0": gguf("Q8_0"),
    "gguf q4_0": gguf("Q4_0"),
    "gguf q4_1": gguf("Q4_1"),
    "gguf q4_1 llama": gguf("Q4_1", "llama"),
    "gguf q4_K": gguf("Q4_K"),
    "gguf q5_K": gguf("Q5_K"),
    "gguf q6_K": gguf("Q6_K"),
    "gguf q6_K llama": gguf("Q6_K", "llama"),
    "gguf mxfp4": gguf("MXFP4"),
}

SHAPES: dict[str, tuple[int, int]] = {
    "nf4 across rows": (24, 80),
    **dict.fromkeys(("gguf q4_K", "gguf q5_K", "gguf q6_K", "gguf q6_K llama"), (24, 512)),
}
"""Shapes of the random weight other than (24, 128)."""
