"""Answers to the benchmarks' questions, costs and gates on them, as the page shows them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.run_layout import load_records
from lorasmith.records.base import Interval
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import ComparisonRecord
from lorasmith.records.release import Gate, GateRecord, GateResult, TimingRecord
from lorasmith.records.scoring import TaskEffect, TaskMetric, TaskResult, ValidationResult
from lorasmith.reporting.fidelity import heat_map
from lorasmith.reporting.page import write_report
from lorasmith.reporting.sections import task_table
from tests.samples import ROLES, SETTINGS, sample_run

BENCHMARKS = (("DROP", "f1"), ("HumanEval", "pass@1"), ("MATH", "accuracy"), ("MMLU", "accuracy"))


def effect(benchmark: str, metric: str, delta: float, verdict: str) -> TaskEffect:
    return TaskEffect(
        benchmark=benchmark, metric=metric, examples=40, value_a=0.4, value_b=0.4 + delta, delta=delta,
        interval=Interval(low=delta - 0.08, high=delta + 0.08), p_value=0.02, verdict=verdict,
    )  # fmt: skip


def add_tasks(run: Path) -> None:
    """Answers of all three models; HumanEval could not be judged for the base."""
    chance = random.Random(3)
    for place, role in enumerate(ROLES):
        result = read_record(run / "validation" / f"{role}.json", ValidationResult)
        metrics = []
        for name, metric in BENCHMARKS:
            value = (
                None if (role, name) == ("base", "HumanEval") else 0.3 + 0.1 * place + 0.1 * chance.random()
            )
            metrics.append(
                TaskMetric(
                    benchmark=name,
                    metric=metric,
                    method="likelihood" if name == "MMLU" else "generation",
                    examples=40,
                    scored=0 if value is None else 38,
                    unscored=40 if value is None else 2,
                    reasons={"no sandbox here": 40} if value is None else {"the answer is empty": 2},
                    hit_limit=3 if name == "MATH" else 0,
                    value=value,
                    interval=None if value is None else Interval(low=value - 0.12, high=value + 0.12),
                )
            )
        record = TaskResult(
            model=result.model, test_set=result.test_set, settings=SETTINGS, metrics=metrics,
            per_example=result.per_example,
        )  # fmt: skip
        write_record(run / "validation" / f"{role}_tasks.json", record)
    path = run / "proof" / "comparison.json"
    effects = {
        "effect": [effect(*BENCHMARKS[0], 0.12, "helps"), effect(*BENCHMARKS[2], -0.2, "hurts")],
        "merge": [effect(*BENCHMARKS[0], 0.0, "no clear effect")],
    }
    record = read_record(path, ComparisonRecord)
    write_record(path, record.model_copy(update={"task_effects": effects}))


def add_costs(run: Path) -> None:
    """A price, and a gate on the bill that fails."""
    path = run / "timing.json"
    write_record(path, read_record(path, TimingRecord).model_copy(update={"price_per_hour": 1.5}))
    gate = Gate(name="budget", metric="cost.dollars", threshold=0.05, advice="rent a cheaper machine")
    results = [GateResult(gate=gate, measured=0.0703, verdict="fail")]
    write_record(run / "cost_gates.json", GateRecord(passed=False, gates=results))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = sample_run(tmp_path / "run", count=20)
    add_tasks(folder)
    add_costs(folder)
    return folder


def page(run: Path, **options: bool) -> str:
    write_report(run, run / "report.html", **options)
    return (run / "report.html").read_text()


def test_three_models_stand_beside_what_adapter_and_merge_change(run: Path) -> None:
    table = task_table(load_records(run))
    assert table is not None
    assert table.roles == list(ROLES)
    drop, humaneval, maths, _ = table.rows
    assert [mark.role for mark in drop.marks] == list(ROLES)
    assert drop.effect is not None and drop.effect.verdict == "helps"
    assert drop.merge is not None and drop.merge.delta == 0.0
    assert [mark.role for mark in humaneval.marks] == ["adapter", "merged"]
    assert maths.merge is None
    for row in table.rows:
        for mark in row.marks:
            share = ((mark.metric.value or 0) - table.axis.low) / (table.axis.high - table.axis.low)
            assert mark.at == pytest.approx(100 * share, abs=0.01)


def test_what_could_not_be_judged_is_never_a_zero(run: Path) -> None:
    text = page(run)
    assert "unscored" in text
    notes = " ".join(text.split("Answers without a verdict")[1].split("</details>")[0].split())
    assert "40 of 40</td> <td>40 × no sandbox here</td>" in notes
    assert '<td class="n">3</td>' in notes
    assert ">0.0 %<" not in text.split('id="tasks"')[1].split("</table>")[0]


def test_a_run_without_tasks_has_no_such_table(tmp_path: Path) -> None:
    assert 'id="tasks"' not in page(sample_run(tmp_path / "plain", count=5))


def test_costs_and_their_gates_stay_out_of_the_packaged_page(run: Path) -> None:
    own, packed = page(run), page(run, timings=False)
    # 168.7 seconds at 1.50 an hour.
    assert "$0.07</td>" in own
    assert "rent a cheaper machine" in own
    for text in ("$0.07", "rent a cheaper machine", "budget"):
        assert text not in packed


def test_the_swallowed_fraction_of_a_layer_is_that_of_its_elements(run: Path) -> None:
    merge = read_record(run / "merged" / "lorasmith_merge.json", MergeRecord)
    heat = heat_map(merge)
    assert heat is not None
    for (layer, _), total in zip(heat.layers, heat.totals, strict=True):
        own = [tensor for tensor in merge.tensors if f".{layer}." in tensor.name]
        swallowed = sum(tensor.swallowed for tensor in own)
        assert total == pytest.approx(swallowed / sum(t.changed + t.swallowed for t in own))
    assert len(heat.totals) == len(heat.layers) > 0
