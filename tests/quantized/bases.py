"""Small quantized bases as transformers and bitsandbytes write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quantized.cases import CASES, MODULE, write_gguf
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


def save_case(folder: Path, plain: Path, case: str) -> Path:
    """The model in `plain` with every linear layer but the head as a case of `CASES` stores it."""
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    config = json.loads((plain / "config.json").read_text())
    for name, weight in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        made = CASES[case](weight.float())
        config["quantization_config"] = made.config
        module = name.removesuffix(".weight")
        tensors |= {part.replace(MODULE, module): stored for part, stored in made.tensors.items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_gpt_oss(folder: Path) -> tuple[Path, Path]:
    """A tiny gpt-oss with random experts in bfloat16, and one as it is published, its experts in MXFP4."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=300, hidden_size=64, intermediate_size=32, num_hidden_layers=1, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=256, initializer_range=0.2, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    plain, packed = folder / "plain", folder / "packed"
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
    packed.mkdir()
    for file in plain.iterdir():
        (packed / file.name).write_bytes(file.read_bytes())
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(122, 125, groups, dtype=torch.uint8)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    body = json.loads((plain / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "mxfp4"}
    }
    (packed / "config.json").write_text(json.dumps(body))
    return plain, packed


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def save_gguf(folder: Path, plain: Path, kind: str = "Q4_1", *, config: bool = True) -> Path:
    """The llama in `plain` as llama.cpp's conversion writes it, q and k turned, its matrices in one type."""
    import gguf

    folder.mkdir()
    body = json.loads((plain / "config.json").read_text())
    tensors: dict[str, tuple[Any, str]] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight").replace("model.layers.", "blk.")
        for ours, theirs in _GGUF_NAMES.items():
            module = module.replace(ours, theirs)
        heads = {"attn_q": body["num_attention_heads"], "attn_k": body["num_key_value_heads"]}
        values = weight.float()
        count = heads.get(module.rpartition(".")[2])
        if count:
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1:
            tensors[f"{module}.weight"] = (values.numpy(), "F32")
        else:
            raw = gguf.quantize(values.numpy(), getattr(gguf.GGMLQuantizationType, kind))
            tensors[f"{module}.weight"] = (raw, kind)
    sizes = {
        "context_length": 256,
        "embedding_length": body["hidden_size"],
        "feed_forward_length": body["intermediate_size"],
        "vocab_size": body["vocab_size"],
    }
    heads, shared = body["num_attention_heads"], body["num_key_value_heads"]
    write_gguf(folder / "model.gguf", tensors, "llama", heads, shared, **sizes)
    if config:
        for file in plain.iterdir():
            if file.suffix == ".json":
                (folder / file.name).write_bytes(file.read_bytes())
    return folder


FORMATS = [
    "nf4", "fp4", "int8", "fp8 block", "fp8 edges", "fp8 channel", "nvfp4", "nvfp4 modelopt",
    "int4 asymmetric", "int8 bytes", "gptq act-order", "awq", "gguf",
]  # fmt: skip
"""Every format that a whole model is merged and proved in."""


def save_quantized(folder: Path, plain: Path, kind: str) -> Path:
    """The model in `plain` in one of `FORMATS`."""
    if kind in BITSANDBYTES:
        return save_bitsandbytes(folder, plain, **BITSANDBYTES[kind])
    if kind == "gguf":
        return save_gguf(folder, plain)
    return save_case(folder, plain, kind)


def save_plain(folder: Path) -> Path:
    """A tiny llama in bfloat16."""
    return save_base(folder, "llama", **SIZES)
