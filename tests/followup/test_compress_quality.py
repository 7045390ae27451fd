"""What a compressed model lost: figures against plain forwards, gates, and measuring that goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorasmith
from lorasmith.errors import DataError, InputError, UsageError
from lorasmith.files.jsonl import write_rows
from lorasmith.followup.compression import quantize
from lorasmith.followup.compression.compress import compress, judge_compression
from lorasmith.options import CompressOptions
from lorasmith.proving.behaviour.compare import compare_pair
from lorasmith.records.compression import CompressRecord
from tests.followup.compressing import LOOSE, questions, record_of, unpacked
from tests.tiny import load_model, tiny_rows, tiny_tokenizer


def test_the_quality_is_that_of_plain_forwards(compressed: Path) -> None:
    """KL and agreement against softmaxes of both models in float64, over the response tokens."""
    found = record_of(compressed / "int4").quality
    assert found is not None
    a, b = load_model(compressed / "base").double(), unpacked(compressed / "int4").double()
    tokenizer, kl, same = tiny_tokenizer(), [], []
    for row in tiny_rows(24):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        ids = [
            *prompt,
            *tokenizer(row["response"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            p, q = (
                model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (a, b)
            )
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.kl.mean == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.kl.q99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert found.top1_agreement == pytest.approx(np.mean(same), abs=2 / len(same))
    assert found.kl.mean > 1e-3
    assert {"source", "domain", "difficulty"} <= set(record_of(compressed / "int4").quality_groups)


def test_a_failed_gate_is_an_answer(compressed: Path, tmp_path: Path) -> None:
    shutil.copytree(compressed / "int4", tmp_path / "int4")
    options = CompressOptions(test_set=compressed / "rows.jsonl", limit=4, max_mean_kl=1e-6)
    record = compress(compressed / "base", tmp_path / "int4", options=options, compare=compare_pair)
    assert record.passed is False
    assert [gate.verdict for gate in record.gates if gate.gate.metric == "compressed.mean_kl"] == ["fail"]


def right_letters(model: Any) -> list[float]:
    """1 where the likeliest of the four letters is the answer: one plain forward a question, in float64."""
    tokenizer = tiny_tokenizer()
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABCD"]
    found = []
    for row in questions():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        with torch.no_grad():
            best = int(model.double()(torch.tensor([ids])).logits[0, -1, letters].argmax())
        found.append(float("ABCD"[best] == row["metadata"]["answer"]))
    return found


def test_task_accuracy_by_group_is_that_of_plain_forwards(compressed: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*questions(), *tiny_rows(3)])
    shutil.copytree(compressed / "int4", tmp_path / "int4")
    options = CompressOptions(test_set=tmp_path / "rows.jsonl", max_accuracy_drop=1.0, **LOOSE)
    record = lorasmith.compress(compressed / "base", tmp_path / "int4", options=options)
    a = right_letters(load_model(compressed / "base"))
    b = right_letters(unpacked(compressed / "int4"))
    assert record.tasks is not None and a != b
    assert record.tasks.overall.value_a == pytest.approx(np.mean(a))
    assert record.tasks.overall.value_b == pytest.approx(np.mean(b))
    law = record.tasks.groups["domain"]["law"]
    assert law.examples == 8
    assert (law.value_a, law.value_b) == pytest.approx((np.mean(a[::3]), np.mean(b[::3])))
    assert [effect.metric for effect in record.tasks.metrics] == ["accuracy"]
    [gate] = [gate for gate in record.gates if gate.gate.metric == "compressed.accuracy_drop"]
    assert gate.measured == pytest.approx(np.mean(a) - np.mean(b)) and gate.verdict == "pass"
    assert gate.interval is not None and gate.interval.low <= gate.measured <= gate.interval.high
    assert record.passed is True
    # The same record with a stricter gate fails.
    [strict] = judge_compression(record, {"accuracy_drop": gate.measured - 0.01})
    assert strict.verdict == "fail"


def test_without_questions_it_says_so_and_an_asked_gate_does_not_pass(
    compressed: Path, tmp_path: Path
) -> None:
    shutil.copytree(compressed / "int4", tmp_path / "int4")
    options = CompressOptions(test_set=compressed / "rows.jsonl", limit=4, **LOOSE)
    record = lorasmith.compress(compressed / "base", tmp_path / "int4", options=options)
    assert [finding.code for finding in record.findings] == ["no-task"] and record.passed is True
    asked = options.model_copy(update={"max_accuracy_drop": 0.1})
    record = lorasmith.compress(compressed / "base", tmp_path / "int4", options=asked)
    assert record.passed is False
    assert [gate.verdict for gate in record.gates].count("not measured") == 1


def test_a_size_is_a_gate(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(compressed / "int4")
    assert [gate.verdict for gate in judge_compression(record, {"bytes": record.bytes})] == ["pass"]
    assert [gate.verdict for gate in judge_compression(record, {"bytes": record.bytes - 1})] == ["fail"]
    assert [gate.verdict for gate in judge_compression(record, {"q99_kl": 1e-9})] == ["fail"]
    monkeypatch.setattr(quantize, "WORKER", ("-c", "raise SystemExit('too late')"))

    def refused(**limits: Any) -> None:
        lorasmith.compress(compressed / "base", tmp_path / "out", **limits)

    with pytest.raises(UsageError, match=r"the limit is 1\.0 kB"):  # before any work
        refused(target_size="1000B")
    with pytest.raises(UsageError, match="no option 'max_speed'"):
        refused(max_speed=1)
    with pytest.raises(UsageError, match="--max-mean-kl is nan"):
        refused(max_mean_kl=float("nan"))


def test_what_cannot_be_measured_is_told_before_the_work(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "WORKER", ("-c", "raise SystemExit('too late')"))
    with pytest.raises(InputError, match="does not exist"):
        options = CompressOptions(test_set=tmp_path / "absent.jsonl")
        lorasmith.compress(compressed / "base", tmp_path / "out", options=options)
    with pytest.raises(DataError, match="24 of 24 calibration rows are in the test set"):
        rows = compressed / "rows.jsonl"
        lorasmith.compress(
            compressed / "base", tmp_path / "out", method="calibrated", calibration=rows, test_set=rows
        )
    assert not (tmp_path / "out").exists()


class Watched:
    """A progress that remembers what was computed, and may stop in the middle of something."""

    def __init__(self, stop_in: str | None = None) -> None:
        self.stop_in = stop_in
        self.moved: dict[str, float] = {}

    @contextmanager
    def __call__(self, label: str, *, total: float, unit: str) -> Iterator[Callable[[float], None]]:
        self.moved[label] = 0

        def advance(step: float) -> None:
            self.moved[label] += step
            if label == self.stop_in:
                raise KeyboardInterrupt

        yield advance


def test_a_stopped_measuring_goes_on_and_a_finished_one_is_kept(compressed: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*questions(), *tiny_rows(3)])
    rows = CompressOptions(test_set=tmp_path / "rows.jsonl", **LOOSE)

    def measure(output: Path, watched: Watched, options: CompressOptions = rows) -> CompressRecord:
        return lorasmith.compress(compressed / "base", output, options=options, progress=watched)

    for name in ("whole", "stopped"):
        shutil.copytree(compressed / "int4", tmp_path / name)
    once = Watched()
    whole = measure(tmp_path / "whole", once)
    assert {"Original", "Compressed", "Compare"} <= set(once.moved)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "stopped", Watched("Compressed"))
    answers = next(label for label in once.moved if label not in ("Original", "Compressed", "Compare"))
    again = Watched(answers)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "stopped", again)
    assert "Original" not in again.moved  # kept from the first time
    last = Watched()
    assert measure(tmp_path / "stopped", last) == whole
    assert not {"Original", "Compressed"} & set(last.moved)
    assert [path.name for path in tmp_path.glob(".*measuring")] == []
    # The same command on what is finished computes nothing; another limit judges the figures that are there.
    idle = Watched()
    assert measure(tmp_path / "stopped", idle) == whole
    strict = measure(tmp_path / "stopped", idle, rows.model_copy(update={"max_mean_kl": 0.0}))
    assert (strict.passed, strict.quality, idle.moved) == (False, whole.quality, {})
