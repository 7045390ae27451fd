"""Estimates: by hand from the published formulas, and from real folders."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lorasmith
from lorasmith.checkpoint.adapter import open_adapter
from lorasmith.checkpoint.model import open_checkpoint
from lorasmith.data.rows import read_examples
from lorasmith.files.atomic import read_record
from lorasmith.files.jsonl import write_rows
from lorasmith.merging.calibrated.rows import load_calibration
from lorasmith.merging.plan import plan_merge
from lorasmith.options import MergeOptions, RunOptions
from lorasmith.preflight.doctor import examine
from lorasmith.preflight.estimate import (
    EFFICIENCY,
    FEEDBACK,
    LOAD_BYTES,
    MERGE_WORK,
    Rates,
    answer_seconds,
    estimate,
    least_memory,
    merge_seconds,
    validate_seconds,
)
from lorasmith.preflight.sizes import (
    AnswerSize,
    CalibrationSize,
    ModelSize,
    WorkSize,
    answer_size,
    calibration_size,
    model_size,
    work_size,
)
from lorasmith.records.release import TimingRecord
from tests.samples import sample_examples
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


def test_a_merge_takes_as_long_as_its_elements_do() -> None:
    fast_disk = replace(RATES, write_bytes=1e12)
    assert merge_seconds(SEVEN, fast_disk) == pytest.approx(15.231e9 / (250e6 / MERGE_WORK), rel=1e-3)
    twice = replace(fast_disk, round_bytes=500e6)
    assert merge_seconds(SEVEN, twice) == pytest.approx(merge_seconds(SEVEN, fast_disk) / 2)


def test_a_fitted_merge_counts_rows_moments_inverses_and_columns() -> None:
    one = CalibrationSize(
        tokens=1_000, squares=0, moments=6e12, factors=2e12, feedback=5e12 * FEEDBACK, elements=10**9
    )
    more = merge_seconds(SEVEN, RATES, one) - merge_seconds(SEVEN, RATES)
    forward = 2 * 6.52562176e9 * 1_000 / EFFICIENCY
    assert more == pytest.approx((forward + 6e12 + 2 * 2e12 + 5e12) / 50e12 + 15.231e9 / LOAD_BYTES, rel=1e-3)
    plain, fitted = estimate(SEVEN, WORK, RATES), estimate(SEVEN, WORK, RATES, calibration=one)
    changed = [a.stage for a, b in zip(plain, fitted, strict=True) if a != b]
    assert changed == ["merge", "prove-weights"]
    assert fitted[3].memory_bytes > plain[3].memory_bytes


def test_answers_are_counted_at_their_limits() -> None:
    answers = AnswerSize(rows=10, tokens=0, written=16_000, together=16)
    slow = replace(RATES, read_bytes=1e9)
    steps = 4 * 7_615_616_512 / 1e9 * 1_000
    assert answer_seconds(SEVEN, answers, slow) == pytest.approx(steps + 15.231e9 / LOAD_BYTES, rel=1e-3)
    # Where memory is fast, it is the products that take time.
    token = 2 * (6.52562176e9 + 152_064 * 3584) / (EFFICIENCY * 50e12)
    fast = answer_seconds(SEVEN, answers, replace(RATES, read_bytes=1e15))
    assert fast == pytest.approx(16_000 * token + 15.231e9 / LOAD_BYTES, rel=1e-3)
    names = [stage.stage for stage in estimate(SEVEN, WORK, RATES, answers=answers)]
    assert [name for name in names if name.startswith("tasks")] == [
        "tasks-base", "tasks-adapter", "tasks-merged",
    ]  # fmt: skip


def test_calibration_is_sized_by_the_shapes_of_the_merge(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, r=4)
    write_rows(tmp_path / "train.jsonl", tiny_rows(20))
    plan = plan_merge(open_checkpoint(base), [open_adapter(adapter)], [1.0], "base")
    size = calibration_size(plan, [tmp_path / "train.jsonl"], base, 10**6)
    used = load_calibration(
        [tmp_path / "train.jsonl"], base, [adapter],
        budget=10**6, test_set=None, leave_out=False, wording=MergeOptions(template="auto"), seed=0,
    ).use  # fmt: skip
    # A template adds more or less than the 20 tokens that are taken for one.
    assert size.tokens == pytest.approx(used.tokens, rel=0.5)
    wide = {output.name: output.shape for output in plan.outputs if output.change and len(output.shape) == 2}
    assert size.elements == sum(rows * columns for rows, columns in wide.values())
    assert size.feedback == sum(9 * rows * columns**2 for rows, columns in wide.values())
    assert calibration_size(plan, [tmp_path / "train.jsonl"], base, 50).tokens == 50


def test_questions_and_the_length_of_their_answers_are_counted(tmp_path: Path) -> None:
    examples = sample_examples(20)
    size = answer_size(examples, tmp_path)
    by_source = Counter(example.metadata.source for example in examples)
    limits = {"DROP": 64, "MATH": 1280, "HumanEval": 384}
    assert size.written == sum(limits.get(source, 0) * count for source, count in by_source.items())
    assert answer_size([row for row in examples if row.metadata.source == "none"], tmp_path).rows == 0


def test_the_sizes_of_a_real_run_are_those_estimated(tmp_path: Path) -> None:
    """Times depend on who else computes; sizes do not. Memory is the libraries' here, not the model's."""
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", base)
    write_rows(tmp_path / "test.jsonl", tiny_rows(10))
    write_rows(tmp_path / "train.jsonl", tiny_rows(10, seed=3))
    config = RunOptions.make(
        {
            "base": base, "adapter": tmp_path / "adapter", "test_set": tmp_path / "test.jsonl",
            "train": (tmp_path / "train.jsonl",), "output": tmp_path / "run",
        }
    )  # fmt: skip
    expected = examine(config)
    assert expected.memory_bytes and expected.disk_bytes
    run = lorasmith.run(config)
    stages = {stage.stage: stage for stage in expected.stages}
    assert run.base.overall.tokens == pytest.approx(stages["validate-base"].disk_bytes / 60, abs=0), (
        "the scored tokens"
    )
    weights = sum(path.stat().st_size for path in (tmp_path / "run" / "merged").glob("*.safetensors"))
    assert stages["merge"].disk_bytes == pytest.approx(weights, rel=0.1)
    timed = read_record(tmp_path / "run" / "timing.json", TimingRecord).stages
    assert {timing.stage for timing in timed} >= set(stages) - {"start"}
    peak = max(timing.peak_rss_bytes or 0 for timing in timed)
    assert peak / 2 < expected.memory_bytes < 3 * peak


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
