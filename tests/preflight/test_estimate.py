"""Estimates: by hand from the published formulas, and from real folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.checkpoint.adapter import open_adapter
from lorasmith.checkpoint.model import open_checkpoint
from lorasmith.files.jsonl import read_examples, write_rows
from lorasmith.preflight.estimate import (
    EFFICIENCY,
    LOAD_BYTES,
    Rates,
    estimate,
    least_memory,
    validate_seconds,
)
from lorasmith.preflight.sizes import ModelSize, WorkSize, model_size, work_size
from tests.tiny import load_model, save_adapter, save_base, tiny_rows, tiny_tokenizer

SEVEN = ModelSize(
    parameters=7_615_616_512, active=6_525_621_760, hidden=3584, layers=28, vocabulary=152_064,
    context=32_768, base_bytes=15_231_233_024, merged_bytes=15_231_233_024, adapter_parameters=40_370_176,
)  # fmt: skip
"""Qwen2.5-7B by its config, with a rank-16 adapter on all linear modules."""
WORK = WorkSize(
    rows=500, tokens=200_000, scored=50_000, longest=2_000, squares=120_000_000,
    floor_tokens=4_000, counted=True,
)  # fmt: skip
RATES = Rates(flops=50e12, write_bytes=1e9)


def test_scoring_follows_the_published_counts_of_operations() -> None:
    products = 2 * 6.52562176e9 * 200_000
    attention = 2 * 28 * 3584 * 120e6
    head = 2 * 152_064 * 3584 * 50_000
    expected = (products + attention + head) / (50e12 * EFFICIENCY) + 15.231e9 / LOAD_BYTES
    assert validate_seconds(SEVEN, WORK, RATES) == pytest.approx(expected, rel=1e-4)
    assert validate_seconds(SEVEN, WORK, RATES, adapter=True) > validate_seconds(SEVEN, WORK, RATES)


def test_one_model_lies_in_memory_at_a_time() -> None:
    stages = {stage.stage: stage for stage in estimate(SEVEN, WORK, RATES)}
    assert least_memory(SEVEN) == 4 * 7_615_616_512
    assert stages["compare"].memory_bytes > stages["validate-base"].memory_bytes > least_memory(SEVEN)
    assert stages["compare"].memory_bytes < 2 * least_memory(SEVEN)
    # The hidden states of 50,000 tokens, from both models.
    assert stages["compare"].disk_bytes == 2 * 4 * 3584 * 50_000
    assert stages["merge"].memory_bytes < 2e9
    assert stages["merge"].disk_bytes == SEVEN.merged_bytes


def test_a_slow_disk_decides_the_time_of_the_merge() -> None:
    slow = {stage.stage: stage for stage in estimate(SEVEN, WORK, Rates(flops=50e12, write_bytes=10e6))}
    assert slow["merge"].seconds == pytest.approx(1523, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sizes_of_a_model_are_those_that_transformers_counts(tmp_path: Path, name: str) -> None:
    base = save_base(tmp_path / "base", name)
    adapter = open_adapter(save_adapter(tmp_path / "adapter", base))
    size = model_size(open_checkpoint(base), adapter, 1)
    model = load_model(base)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    outer = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    positions = getattr(getattr(model, "transformer", None), "wpe", None)
    assert size.active == size.parameters - sum(weight.numel() for weight in outer)
    assert positions is None or size.active > positions.weight.numel()
    config = model.config
    assert (size.hidden, size.layers) == (config.hidden_size, config.num_hidden_layers)
    assert size.vocabulary == config.vocab_size
    assert size.adapter_parameters == sum(info.elements for info in adapter.tensors.values())


def test_of_experts_only_those_a_token_meets_count(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral")
    checkpoint = open_checkpoint(base)
    size = model_size(checkpoint, None, 1)
    experts = sum(info.elements for name, info in checkpoint.tensors.items() if ".experts." in name)
    config = checkpoint.config
    used = config["num_experts_per_tok"] / config["num_local_experts"]
    assert 0 < used < 1
    outer = 2 * config["vocab_size"] * config["hidden_size"]
    assert size.active == pytest.approx(size.parameters - outer - experts * (1 - used), abs=1)


def test_tokens_are_counted_with_the_bases_tokenizer(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.jsonl", tiny_rows(12))
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    examples = read_examples(tmp_path / "t.jsonl")
    size = work_size(examples, tmp_path / "base")
    tokenizer = tiny_tokenizer()
    responses = [len(tokenizer(row.response, add_special_tokens=False).input_ids) for row in examples]
    assert size.scored == sum(responses) + 12
    assert size.counted
    guessed = work_size(examples, tmp_path)
    assert not guessed.counted
    assert guessed.rows == 12


def test_a_damaged_tokenizer_is_left_to_scoring(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.jsonl", tiny_rows(2))
    (tmp_path / "tokenizer.json").write_text("{")
    assert not work_size(read_examples(tmp_path / "t.jsonl"), tmp_path).counted
