"""Every variant and architecture: the right merge is PEFT's own, done in float64 and rounded once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lorasmith.errors import AdapterError
from lorasmith.proving.weights.prove import prove
from lorasmith.records.proof import WeightProof
from tests.tiny import ARCHITECTURES, load_model, save_adapter, save_base, tiny_tokenizer

Tensors = dict[str, torch.Tensor]
IDS = torch.tensor([[1, 5, 290, 7, 22, 100, 150]])


def merge_right(base: Path, adapter: Path, merged: Path) -> Path:
    """PEFT's merge in float64, then one rounding to float32 (torch's cast from float64 rounds once)."""
    model = PeftModel.from_pretrained(load_model(base, torch.float64), adapter)
    model.double().merge_and_unload().float().save_pretrained(merged)
    tiny_tokenizer().save_pretrained(merged)
    return merged


def untied(base: Path, copy: Path) -> Path:
    """The same model with a head of its own."""
    shutil.copytree(base, copy)
    tensors = load_file(copy / "model.safetensors")
    embedding = next(name for name in tensors if "embed_tokens" in name or "wte" in name)
    tensors["lm_head.weight"] = tensors[embedding].clone()
    write_tensors(copy, tensors)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return copy


def write_tensors(folder: Path, tensors: Tensors) -> None:
    """Put other tensors into a model folder."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def show(proof: WeightProof) -> str:
    """What a failing assertion should print."""
    return "\n".join(f.message for f in proof.findings) + f"\n{proof.differences[:3]}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """One base folder per architecture and settings."""
    place = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {}

    def make(name: str, **overrides: Any) -> Path:
        key = f"{name}-{len(overrides)}"
        if key not in made:
            made[key] = save_base(place / key, name, **overrides)
        return made[key]

    return make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str, bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases(architecture)
    adapter = save_adapter(tmp_path / "adapter", base, bias="all")
    proof = prove(base, adapter, merge_right(base, adapter, tmp_path / "merged"))
    assert proof.grade == "exact", show(proof)
    assert proof.adapter_tensors_used == proof.adapter_tensors_total >= 16
    assert any(tensor.kind == "merged" for tensor in proof.tensors)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank-stabilised": ("llama", {"use_rslora": True, "r": 3}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}),
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA on fused projections": ("phi3", {"use_dora": True}),
    "DoRA on Conv1D": ("gpt2", {"use_dora": True}),
    "DoRA on an embedding": ("llama", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding of GPT-NeoX": ("gpt-neox", {"target_modules": ["embed_in", "query_key_value"]}),
    "head": ("llama", {"target_modules": ["lm_head"]}),
    "lora_bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "lora_bias on Conv1D": ("gpt2", {"lora_bias": True, "target_modules": ["c_attn", "c_proj"]}),
    "biases of adapted layers": ("gpt2", {"bias": "lora_only"}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}),
    "saved container": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "saved head": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved tied embedding": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved tied embedding of GPT-2": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "ensure_weight_tying": True},
    ),
    "saved for both": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "trainable tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 290, 7]}},
    ),
    "trainable tokens as a list": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [9, 2]},
    ),
    "trainable tokens, tied": (
        "gemma3",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [299, 0]}},
    ),
    "experts of Qwen": (
        "qwen3-moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "one parameter of Mixtral's experts": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "r": 3},
    ),
    "experts stored transposed": (
        "llama4-text",
        {
            "target_modules": [],
            "target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
        },
    ),
    "language model of a vision model": (
        "llava",
        {"target_modules": r".*language_model.*\.(q_proj|up_proj)", "use_dora": True},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name: str, bases: Callable[..., Path], tmp_path: Path) -> None:
    architecture, config = VARIANTS[name]
    base = bases(architecture)
    adapter = save_adapter(tmp_path / "adapter", base, **config)
    merged = merge_right(base, adapter, tmp_path / "merged")
    proof = prove(base, adapter, merged)
    assert proof.grade == "exact", show(proof)
    assert proof.adapter_tensors_used == proof.adapter_tensors_total > 0
    unmerged = PeftModel.from_pretrained(load_model(base), adapter).eval()
    with torch.no_grad():
        difference = (unmerged(IDS).logits - load_model(merged)(IDS).logits).abs().max()
    assert difference < 1e-4, "the reference itself is what the adapter computes"


GPT_OSS = {
    **ARCHITECTURES["qwen3-moe"],
    "model_type": "gpt_oss",
    "num_local_experts": 4,
    "intermediate_size": 16,
    "layer_types": ["full_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss"])
def test_square_experts_go_by_type_and_version(
    architecture: str, bases: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "gpt-oss", GPT_OSS)
    overrides = {"moe_intermediate_size": 16} if architecture == "qwen3-moe" else {}
    base = bases(architecture, **overrides)
    parameters = ["mlp.experts.gate_up_proj"]
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=[], target_parameters=parameters)
    merged = merge_right(base, adapter, tmp_path / "merged")
    proof = prove(base, adapter, merged)
    assert proof.grade == "exact", show(proof)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": "0.18.1"}))
    # Before 0.19 PEFT read [E, out, in] the other way round; a transposed model it always read the same way.
    assert prove(base, adapter, merged).grade == ("different" if architecture == "qwen3-moe" else "exact")


TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "both": ("gemma3", {"target_modules": ["embed_tokens", "lm_head"]}),
    "both, asked to stay tied": (
        "llama-tied",
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "embedding of GPT-2": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "DoRA on the embedding": ("llama-tied", {"target_modules": ["embed_tokens"], "use_dora": True}),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_are_untied(name: str, bases: Callable[..., Path], tmp_path: Path) -> None:
    architecture, config = TIED[name]
    base = bases(architecture)
    adapter = save_adapter(tmp_path / "adapter", base, **config)
    loose = tmp_path / "loose"
    shutil.copytree(adapter, loose)
    body = json.loads((loose / "adapter_config.json").read_text())
    (loose / "adapter_config.json").write_text(json.dumps({**body, **config, "ensure_weight_tying": False}))
    right = merge_right(untied(base, tmp_path / "untied"), loose, tmp_path / "right")
    proof = prove(base, adapter, right)
    assert proof.grade == "exact", show(proof)
    unmerged = PeftModel.from_pretrained(load_model(base), adapter).eval()
    with torch.no_grad():
        assert (unmerged(IDS).logits - load_model(right)(IDS).logits).abs().max() < 1e-4
    # PEFT itself writes both updates into the one tensor.
    proof = prove(base, adapter, merge_right(base, adapter, tmp_path / "peft"))
    assert proof.grade == "different"
    # Right tensors under a config that ties them load as another model.
    config_file = right / "config.json"
    body = json.loads(config_file.read_text())
    default = AutoConfig.for_model(body["model_type"]).tie_word_embeddings
    for flag, ties in (({"tie_word_embeddings": True}, True), ({}, default)):
        body.pop("tie_word_embeddings", None)
        config_file.write_text(json.dumps({**body, **flag}))
        proof = prove(base, adapter, right)
        assert proof.grade == ("different" if ties else "exact")
        errors = {finding.code for finding in proof.findings if finding.severity == "error"}
        assert errors == ({"wrong-tie"} if ties else set())


def test_an_untied_base_must_not_be_tied(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases("llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    merged = merge_right(base, adapter, tmp_path / "merged")
    body = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**body, "tie_word_embeddings": True}))
    assert prove(base, adapter, merged).grade == "different"


def test_a_resized_vocabulary(bases: Callable[..., Path], tmp_path: Path) -> None:
    for architecture in ("llama", "llama-tied"):
        base, place = bases(architecture), tmp_path / architecture
        adapter = save_adapter(place / "adapter", base, target_modules=["q_proj"])
        tensors = load_file(adapter / "adapter_model.safetensors")
        rows = torch.randn(305, 32)
        tensors["base_model.model.model.embed_tokens.weight"] = rows
        if architecture == "llama":
            tensors["base_model.model.lm_head.weight"] = torch.randn(305, 32)
        save_file(tensors, adapter / "adapter_model.safetensors")
        model = load_model(base, torch.float64)
        model.resize_token_embeddings(305)
        merged = place / "merged"
        peft_model = PeftModel.from_pretrained(model, adapter)
        peft_model.double().merge_and_unload().float().save_pretrained(merged)
        tiny_tokenizer().save_pretrained(merged)
        proof = prove(base, adapter, merged)
        assert proof.grade == "exact", show(proof)
        body = json.loads((merged / "config.json").read_text())
        (merged / "config.json").write_text(json.dumps({**body, "vocab_size": 300}))
        errors = [f.code for f in prove(base, adapter, merged).findings if f.severity == "error"]
        assert errors == ["wrong-vocabulary"]


def _rename(folder: Path, file: str, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / file)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def test_adapters_under_the_names_of_transformers_4(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases("llava")
    adapter = save_adapter(tmp_path / "llava", base, target_modules=r".*language_model.*q_proj")
    merged = merge_right(base, adapter, tmp_path / "llava-merged")
    for old in ("language_model.model.", "model.language_model."):
        copy = tmp_path / old
        shutil.copytree(adapter, copy)
        _rename(
            copy,
            "adapter_model.safetensors",
            lambda name, old=old: name.replace("model.language_model.", old, 1).replace(
                "base_model.", "base_model.", 1
            ),
        )
        if old != "model.language_model.model.":
            assert prove(base, copy, merged).grade == "exact"
        else:
            with pytest.raises(AdapterError, match="no tensor"):
                prove(base, copy, merged)


@pytest.mark.parametrize(
    ("architecture", "parts", "inside"),
    [
        ("mixtral", ("w1", "w2", "w3"), "block_sparse_moe"),
        ("qwen3-moe", ("gate_proj", "up_proj", "down_proj"), "mlp"),
    ],
)
def test_adapters_on_single_experts(
    architecture: str, parts: tuple[str, ...], inside: str, bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases(architecture)
    weights = load_file(base / "model.safetensors")
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, weight in weights.items():
        if f".{inside}.experts." in name:
            path, rank = f"base_model.model.{name.removesuffix('.weight')}", 4
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    body = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(parts),
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(body))
    merged = merge_right(base, adapter, tmp_path / "merged")
    proof = prove(base, adapter, merged)
    assert proof.grade == "exact", show(proof)
    assert proof.adapter_tensors_used == 2 * 2 * 4 * 3


def test_a_base_saved_without_its_outer_name(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases("gpt2")
    adapter = save_adapter(tmp_path / "adapter", base)
    merged = merge_right(base, adapter, tmp_path / "merged")
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    for folder in (bare, merged):
        _rename(folder, "model.safetensors", lambda name: name.removeprefix("transformer."))
    assert prove(bare, adapter, merged).grade == "exact"


def test_the_copy_of_the_base_in_the_adapter_tells_another_base(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", bases("llama"), target_modules=["embed_tokens"])
    other = save_base(tmp_path / "other", seed=5)
    with pytest.raises(AdapterError, match=r"copy of .*embed_tokens"):
        prove(other, adapter, merge_right(bases("llama"), adapter, tmp_path / "merged"))


def test_dora_ties_are_decided_exactly(tmp_path: Path) -> None:
    # Rows of four ones have the norm 2: m = 2 + 2⁻⁷ puts every element halfway between 1 and 1 + 2⁻⁷.
    m = torch.full((6,), 2 + 2.0**-7)
    m[1::3] += 2.0**-22
    m[2::3] -= 2.0**-22
    sign = torch.tensor([1.0, 1, 1, -1, -1, -1])
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    for folder, values in ((base, [1.0, 1.0, 1.0]), (merged, [1, 1 + 2.0**-7, 1])):
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        weight = (torch.tensor(values * 2) * sign)[:, None].repeat(1, 4).bfloat16()
        write_tensors(folder, {"a.weight": weight})
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "use_dora": true}')
    path = "base_model.model.a"
    factors = {f"{path}.lora_A.weight": torch.ones(2, 4), f"{path}.lora_B.weight": torch.zeros(6, 2)}
    save_file({**factors, f"{path}.lora_magnitude_vector": m}, adapter / "adapter_model.safetensors")
    proof = prove(base, adapter, merged)
    assert proof.grade == "exact", show(proof)
    assert proof.tensors[0].redone >= 8
    half_up = torch.tensor([1 + 2.0**-7, 1 + 2.0**-7, 1] * 2) * sign
    write_tensors(merged, {"a.weight": half_up[:, None].repeat(1, 4).bfloat16()})
    assert prove(base, adapter, merged).tensors[0].wrong == 8
