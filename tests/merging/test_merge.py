"""A merge is right to the last bit, and the same everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasmith.files.digests import digest_folder
from lorasmith.merging import disk, writers
from lorasmith.merging.merge import merge
from tests.merging.planted import NAMES, PREFIX, logits, plant, tensors_of
from tests.merging.reference import merged_value, nearest
from tests.tiny import save_adapter


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 3, "lora_alpha": 5},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 1}},
        {
            "rank_pattern": {r"layers\.\d+\.self_attn\..*": 5},
            "alpha_pattern": {"model.layers.0.mlp.up_proj": 24},
        },
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "regex-patterns", "one-layer", "excluded"],
)
def test_the_merged_model_computes_what_the_adapter_does(
    tmp_path: Path, base: Path, settings: dict[str, Any]
) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    merge(base, adapter, tmp_path / "out", precision="float32")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    alone = logits(plain)
    unmerged = logits(PeftModel.from_pretrained(plain, adapter).eval())
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (unmerged - alone).std() > 0.01 * alone.std(), "an adapter that does nothing tests nothing"
    # Two float32 forwards of one function differ by some ulps that the layers amplify.
    assert (merged - unmerged).abs().max() < 1e-4 * unmerged.std()


@pytest.mark.parametrize("low_bits", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_every_element_is_the_correctly_rounded_formula(
    tmp_path: Path, stored: torch.dtype, precision: str, low_bits: bool
) -> None:
    base, adapter = plant(tmp_path, stored, low_bits=low_bits)
    record = merge(base, adapter, tmp_path / "out", precision=precision)
    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[precision]
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    for result in record.tensors:
        weights = before[result.name].double().tolist()
        up = factors[PREFIX + result.name.replace(".weight", ".lora_B.weight")].double().tolist()
        down = factors[PREFIX + result.name.replace(".weight", ".lora_A.weight")].double().T.tolist()
        exact = [
            [merged_value(weights[row][col], [(2.0, 1.0, up[row], down[col])]) for col in range(32)]
            for row in range(32)
        ]
        expected = [[nearest(value, dtype) for value in values] for values in exact]
        assert after[result.name].dtype == NAMES[dtype]
        assert after[result.name].double().tolist() == expected
        changed = sum(
            new != nearest(merged_value(old, []), dtype)
            for olds, news in zip(weights, expected, strict=True)
            for old, new in zip(olds, news, strict=True)
        )
        touched = sum(
            any(a * b for a, b in zip(up[row], down[col], strict=True))
            for row in range(32)
            for col in range(32)
        )
        assert (result.changed, result.swallowed) == (changed, touched - changed)
        if low_bits and stored != torch.float32 and precision != "float32":
            assert result.exact_redone > 0, "the planted factors make ties"
    for name in set(before) - {result.name for result in record.tensors}:
        assert torch.equal(after[name], before[name].to(NAMES[dtype])), name


def test_two_adapters_add_up_with_their_weights(tmp_path: Path, base: Path) -> None:
    first = save_adapter(tmp_path / "a", base, seed=1, r=3, lora_alpha=7, target_modules=["q_proj", "o_proj"])
    second = save_adapter(tmp_path / "b", base, seed=2, r=2, use_rslora=True, target_modules=["q_proj"])
    weights = [0.7, -1.3]
    record = merge(base, [first, second], tmp_path / "out", weights=weights)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    scales = [7 / 3, 8 / 2**0.5]
    name = "model.layers.0.self_attn.q_proj.weight"
    pairs = []
    for folder in (first, second):
        factors = load_file(folder / "adapter_model.safetensors")
        up = factors[PREFIX + name.replace(".weight", ".lora_B.weight")].double().tolist()
        down = factors[PREFIX + name.replace(".weight", ".lora_A.weight")].double().T.tolist()
        pairs.append((up, down))
    for row in range(32):
        for col in range(32):
            products = [
                (scale, weight, up[row], down[col])
                for scale, weight, (up, down) in zip(scales, weights, pairs, strict=True)
            ]
            value = merged_value(before[name][row, col].item(), products)
            assert after[name][row, col].item() == nearest(value, "BF16")
    assert record.adapter_weights == weights
    assert {tensor.name.split(".")[-2] for tensor in record.tensors} == {"q_proj", "o_proj"}


def test_neither_threads_nor_block_sizes_change_a_byte(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    before = torch.get_num_threads()
    try:
        for number, (threads, block, chunk) in enumerate(
            [(1, 1 << 17, 1 << 24), (2, 100, 1 << 12), (3, 7, 1 << 13)]
        ):
            torch.set_num_threads(threads)
            monkeypatch.setattr(writers, "BLOCK_ELEMENTS", block)
            monkeypatch.setattr(disk, "BUFFER_BYTES", chunk)
            monkeypatch.setattr("os.sched_getaffinity", lambda _, count=threads: range(count))
            merge(base, adapter, tmp_path / f"out{number}")
            digests.add(digest_folder(tmp_path / f"out{number}"))
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


def test_the_same_inputs_elsewhere_give_the_same_bytes(tmp_path: Path, base: Path, adapter: Path) -> None:
    shutil.copytree(base, tmp_path / "other" / "b")
    shutil.copytree(adapter, tmp_path / "other" / "a")
    merge(base, adapter, tmp_path / "one")
    merge(tmp_path / "other" / "b", tmp_path / "other" / "a", tmp_path / "two")
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two")
