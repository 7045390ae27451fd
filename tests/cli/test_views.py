"""What the terminal shows of scores and proofs: every figure that decides, and what is only a part."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorasmith.cli.views import proofs, records
from lorasmith.files.atomic import read_record
from lorasmith.records.base import Finding, Interval
from lorasmith.records.dataset import ContaminationHit, ContaminationRecord
from lorasmith.records.proof import BehaviourProof, ComparisonRecord
from lorasmith.records.scoring import TaskEffect, TaskMetric, TaskResult, ValidationResult
from tests.samples import sample_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_run(tmp_path_factory.mktemp("views") / "run")


def shown(view: Callable[[Any, Console], None], record: Any) -> str:
    sink = io.StringIO()
    view(record, Console(file=sink, width=110))
    return sink.getvalue()


def line(text: str, begin: str) -> list[str]:
    """The words of the first line that begins with some of them."""
    return next(row.split() for row in text.splitlines() if row.strip().startswith(begin))


def test_groups_come_with_tokens_and_intervals(run: Path) -> None:
    result = read_record(run / "validation" / "adapter.json", ValidationResult)
    text = shown(records.show_validation, result)
    found = result.groups["source"]["MATH"]
    assert found.interval is not None
    assert line(text, "source MATH")[2:] == [
        str(found.examples),
        str(found.tokens),
        f"{found.loss:.4f}",
        f"{found.interval.low:.4f}",
        "to",
        f"{found.interval.high:.4f}",
        f"{found.perplexity:.3f}",
    ]


def test_a_comparison_shows_every_statistic_sources_and_flips(run: Path) -> None:
    proof = read_record(run / "proof" / "behaviour.json", BehaviourProof)
    text = shown(proofs.show_behaviour, proof)
    for name in ("perplexity ratio", "median KL", "90 % KL", "95 % KL", "99 % KL", "mean Δp", "RMS Δp"):
        assert name in text
    gpqa = proof.groups["source"]["GPQA"]
    assert line(text, "GPQA")[:3] == ["GPQA", str(gpqa.tokens), f"{gpqa.loss_delta:+.2e}"]
    worst = max(proof.flips, key=lambda flip: flip.margin)
    assert line(text, worst.example)[1:] == ["0", "271", "198", f"{worst.margin:.2e}"]
    assert "Other likeliest token at 10 of" in text


def test_a_benchmark_that_got_worse_is_seen(run: Path) -> None:
    record = read_record(run / "proof" / "comparison.json", ComparisonRecord)
    assert record.adapter_effect is not None
    groups = dict(record.adapter_effect_groups["source"])
    groups["MATH"] = groups["MATH"].model_copy(update={"verdict": "hurts", "p_value": 0.003})
    worse = TaskEffect(
        benchmark="MATH", metric="accuracy", examples=40, value_a=0.5, value_b=0.3, delta=-0.2,
        interval=Interval(low=-0.3, high=-0.1), p_value=0.004, verdict="hurts",
    )  # fmt: skip
    text = shown(
        proofs.show_comparison,
        record.model_copy(
            update={"adapter_effect_groups": {"source": groups}, "task_effects": {"effect": [worse]}}
        ),
    )
    assert line(text, "on MATH")[-2:] == ["0.003", "hurts"]
    assert line(text, "MATH accuracy")[2:] == ["-20.00%", "-30.00%", "to", "-10.00%", "0.004", "hurts"]


def test_what_is_a_part_of_the_test_set_says_so_everywhere(run: Path) -> None:
    validation = read_record(run / "validation" / "base.json", ValidationResult)
    proof = read_record(run / "proof" / "behaviour.json", BehaviourProof)
    tasks = TaskResult(
        model=validation.model,
        test_set=validation.test_set,
        settings=validation.settings,
        metrics=[
            TaskMetric(
                benchmark="DROP",
                metric="f1",
                method="generation",
                examples=5,
                scored=4,
                unscored=1,
                reasons={"empty": 1},
                hit_limit=3,
                max_new_tokens=64,
                value=0.25,
            )
        ],
        per_example=validation.per_example,
    )
    assert line(shown(records.show_tasks, tasks), "DROP f1")[-4:] == ["4", "of", "5", "3"]
    for view, record in (
        (records.show_validation, validation),
        (records.show_tasks, tasks),
        (proofs.show_behaviour, proof),
    ):
        assert "a part of the test set" not in shown(view, record)
        assert "a part of the test set" in shown(view, record.model_copy(update={"partial": True}))


def test_one_example_has_no_standard_error(run: Path) -> None:
    proof = read_record(run / "proof" / "behaviour.json", BehaviourProof)
    one = proof.overall.kl.model_copy(update={"standard_error": None})
    overall = proof.overall.model_copy(update={"kl": one})
    text = shown(proofs.show_behaviour, proof.model_copy(update={"overall": overall}))
    assert line(text, "mean KL  ")[2:4] == [f"{one.mean:.2e}", f"{proof.floor.kl.mean:.2e}"]  # type: ignore[union-attr]


def test_names_from_files_are_shown_as_they_are(run: Path) -> None:
    """A bracket is markup to the terminal library: a name such as `[/x]` would end the command."""
    name = "[/x] [red]y"
    result = read_record(run / "validation" / "base.json", ValidationResult)
    groups = {"source": {name: result.overall, "z": result.overall}}
    finding = Finding(severity="warning", code="truncated", message=f"the first of them {name}")
    text = shown(records.show_validation, result.model_copy(update={"groups": groups, "findings": [finding]}))
    assert f"source {name}" in text
    assert f"the first of them {name}" in text
    proof = read_record(run / "proof" / "behaviour.json", BehaviourProof)
    flip = proof.flips[0].model_copy(update={"example": name})
    assert name in shown(proofs.show_behaviour, proof.model_copy(update={"flips": [flip]}))


def test_overlaps_that_are_no_verdict_are_counted_apart(run: Path) -> None:
    def hit(kind: str, row: str, score: float) -> ContaminationHit:
        return ContaminationHit(kind=kind, test_id=row, train_id="r", train_file="t.jsonl", score=score)

    record = ContaminationRecord(
        verdict="contaminated",
        parameters={"share": 0.2},
        counts={"test_rows": 2},
        hits=[hit("ngram", "little", 0.1), hit("ngram", "much", 0.5), hit("question", "whole", 1.0)],
    )
    text = shown(records.show_contamination, record)
    assert "much" in text and "whole" in text and "little" not in text
    assert "less than 0.2 of theirs: 1" in text
