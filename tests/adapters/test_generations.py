"""Adapters and bases under the module names of transformers 4 and of 5 give the same merge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.merging.merge import merge
from tests.adapters.test_variants import compare, logits
from tests.tiny import load_model, save_adapter, save_base

P = "base_model.model."


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter folder as an older PEFT wrote it."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    body = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}
    (folder / "adapter_config.json").write_text(json.dumps(body))
    return folder


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def per_expert(block: str, names: tuple[str, str, str], hidden: int, inner: int) -> dict[str, torch.Tensor]:
    """Factors of every expert's projections as transformers 4 had them, one module each."""
    found = {}
    seed = 0
    for layer in range(2):
        for expert in range(4):
            for name in names:
                inputs, outputs = (inner, hidden) if name in ("w2", "down_proj") else (hidden, inner)
                path = f"{P}model.layers.{layer}.{block}.experts.{expert}.{name}"
                found[f"{path}.lora_A.weight"] = noise(2, inputs, seed=(seed := seed + 1))
                found[f"{path}.lora_B.weight"] = noise(outputs, 2, seed=(seed := seed + 1))
        gate = f"{P}model.layers.{layer}.{block}.gate"
        found[f"{gate}.lora_A.weight"] = noise(2, hidden, seed=(seed := seed + 1))
        found[f"{gate}.lora_B.weight"] = noise(4, 2, seed=(seed := seed + 1))
    return found


def mixtral(folder: Path) -> Path:
    tensors = per_expert("block_sparse_moe", ("w1", "w2", "w3"), 32, 48)
    return write_adapter(folder, tensors, target_modules=["w1", "w2", "w3", "gate"], peft_version="0.13.0")


def qwen3_moe(folder: Path) -> Path:
    tensors = per_expert("mlp", ("gate_proj", "down_proj", "up_proj"), 32, 24)
    targets = ["gate_proj", "up_proj", "down_proj", "gate"]
    return write_adapter(folder, tensors, target_modules=targets, peft_version="0.15.0")


OLD_EXPERTS: dict[str, Callable[[Path], Path]] = {"mixtral": mixtral, "qwen3-moe": qwen3_moe}


def fused_base(folder: Path, name: str) -> Path:
    """A base saved under the names that transformers 5 uses in memory."""
    save_base(folder, name, dtype=torch.float32)
    load_model(folder).save_pretrained(folder, save_original_format=False)
    assert any(len(tensor.shape) == 3 for tensor in load_file(folder / "model.safetensors").values())
    return folder


@pytest.mark.parametrize("name", sorted(OLD_EXPERTS))
def test_experts_of_transformers_4(tmp_path: Path, name: str) -> None:
    """One LoRA per expert and projection; PEFT fuses them when it loads them."""
    base = save_base(tmp_path / "base", name, dtype=torch.float32, max_shard_size="40KB")
    adapter = OLD_EXPERTS[name](tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out")
    compare(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("name", sorted(OLD_EXPERTS))
def test_experts_of_transformers_4_on_a_fused_base(tmp_path: Path, name: str) -> None:
    base = fused_base(tmp_path / "base", name)
    plain = save_base(tmp_path / "plain", name, dtype=torch.float32)
    adapter = OLD_EXPERTS[name](tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out")
    merge(plain, adapter, tmp_path / "expected")
    found, expected = (logits(load_model(tmp_path / place)) for place in ("out", "expected"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", sorted(OLD_EXPERTS))
def test_fused_experts_on_a_fused_base(tmp_path: Path, name: str) -> None:
    base = fused_base(tmp_path / "base", name)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = save_adapter(
        tmp_path / "adapter", base, target_modules=["q_proj"], target_parameters=parameters
    )
    merge(base, adapter, tmp_path / "out")
    compare(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_vision_language_model_under_both_spellings(tmp_path: Path, prefix: str) -> None:
    base = save_base(tmp_path / "base", "llava", dtype=torch.float32)
    modern = save_adapter(tmp_path / "modern", base, target_modules=r".*language_model.*(q_proj|up_proj)")
    tensors = load_file(modern / "adapter_model.safetensors")
    renamed = {name.replace("model.language_model.", prefix, 1): tensor for name, tensor in tensors.items()}
    if prefix == "language_model.model.":
        renamed = {name.replace(f"{P}model.", P): tensor for name, tensor in renamed.items()}
        renamed = {
            name.replace(f"{P}language_model.layers", f"{P}{prefix}layers"): t for name, t in renamed.items()
        }
    assert all(name.startswith(P + prefix) for name in renamed)
    config = json.loads((modern / "adapter_config.json").read_text())
    older = tmp_path / "older"
    older.mkdir()
    save_file(renamed, older / "adapter_model.safetensors", metadata={"format": "pt"})
    (older / "adapter_config.json").write_text(json.dumps(config))
    merge(base, modern, tmp_path / "expected")
    merge(base, older, tmp_path / "out")
    compare(base, modern, tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert names == set(load_file(base / "model.safetensors")), "the base's own names are kept"


def test_gpt2_as_it_was_first_published(tmp_path: Path) -> None:
    """Its files have no `transformer.` before the names."""
    base = save_base(tmp_path / "base", "gpt2", dtype=torch.float32)
    file = base / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for label, targets in (("plain", ["c_attn", "c_fc"]), ("head", ["wte", "c_proj"])):
        adapter = save_adapter(tmp_path / label, base, target_modules=targets)
        merge(base, adapter, tmp_path / f"out-{label}")
        compare(base, adapter, tmp_path / f"out-{label}")


@pytest.mark.parametrize(("version", "turned"), [("0.18.1", True), ("0.21.2", False), (None, False)])
def test_square_experts_go_by_the_version_of_peft(tmp_path: Path, version: str | None, turned: bool) -> None:
    """Where both orientations fit, PEFT before 0.19 meant [E, in, out]."""
    base = save_base(tmp_path / "base", "qwen3-moe", dtype=torch.float32, moe_intermediate_size=32)
    down, up = noise(8, 32, seed=1), noise(32, 8, seed=2)
    tensors = {}
    for layer in range(2):
        path = f"{P}model.layers.{layer}.mlp.experts"
        tensors[f"{path}.lora_A.weight"] = down.clone()
        tensors[f"{path}.lora_B.weight"] = up.clone()
    adapter = write_adapter(
        tmp_path / "adapter",
        tensors,
        target_modules=[],
        target_parameters=["mlp.experts.down_proj"],
        peft_version=version,
    )
    merge(base, adapter, tmp_path / "out")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("base", "out"))
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        update = 3.0 * up.view(32, 2, 4)[:, :, expert].double() @ down.view(4, 2, 32)[expert].double()
        expected = before[name].double() + (update.T if turned else update)
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-7)
    if not turned and version:
        compare(base, adapter, tmp_path / "out")


def test_dora_as_an_older_peft_named_its_magnitude(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], use_dora=True)
    merge(base, adapter, tmp_path / "expected")
    file = adapter / "adapter_model.safetensors"
    renamed = {re.sub(r"(magnitude_vector)$", r"\1.weight", name): t for name, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    merge(base, adapter, tmp_path / "out")
    found, expected = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "expected"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
