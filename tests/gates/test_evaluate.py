"""Gates: the procedure's criteria pass and fail where they should, and nothing passes unmeasured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorasmith.errors import UsageError
from lorasmith.files.run_layout import RunRecords
from lorasmith.gates import GUIDE_GATES, METRICS, evaluate, split_costs, with_required
from lorasmith.records.base import Interval
from lorasmith.records.dataset import ContaminationHit, ContaminationRecord
from lorasmith.records.proof import ComparisonRecord, GenerationComparison, PairedEffect
from lorasmith.records.release import Gate, StageTiming, TimingRecord
from lorasmith.records.scoring import TaskEffect, TaskMetric, TaskResult, ValidationResult
from tests.records_for_tests import (
    FILE,
    SETTINGS,
    behaviour,
    comparison,
    identity,
    merge,
    metrics,
    validation,
    weights,
)

DIFFICULTY = {"easy": metrics(0.3, 1.4), "hard": metrics(1.0, 2.9)}
EFFECT = PairedEffect(
    examples=5,
    loss_a=0.2,
    loss_b=0.05,
    loss_delta=-0.15,
    perplexity_delta=-0.17,
    interval=Interval(low=-0.2, high=-0.1),
    p_value=0.01,
    verdict="helps",
)
WRITTEN = GenerationComparison(
    max_new_tokens=8,
    examples=5,
    same=4,
    same_fraction=0.8,
    unfinished_a=0,
    unfinished_b=0,
    tokens_before_divergence=7.0,
    divergences=[],
)


def task(benchmark: str, metric: str, value: float | None, scored: int = 10) -> TaskMetric:
    return TaskMetric(
        benchmark=benchmark, metric=metric, method="generation", examples=10, scored=scored,
        unscored=10 - scored, value=value, interval=None if value is None else Interval(low=0.0, high=1.0),
    )  # fmt: skip


def answers(role: str, drop: float, mmlu: float | None) -> TaskResult:
    """DROP has two metrics, of which exact match is the main one."""
    scored = [task("DROP", "f1", 0.9), task("DROP", "exact_match", drop)]
    scored.append(task("MMLU", "accuracy", mmlu, scored=0 if mmlu is None else 30))
    return TaskResult(
        model=identity(role), test_set=FILE, settings=SETTINGS, metrics=scored, per_example=FILE
    )


def task_effect(metric: str, delta: float) -> TaskEffect:
    return TaskEffect(
        benchmark="DROP", metric=metric, examples=10, value_a=0.5, value_b=0.5 + delta, delta=delta,
        interval=Interval(low=delta - 0.1, high=delta + 0.1), p_value=0.5, verdict="no clear effect",
    )  # fmt: skip


def stage(name: str, seconds: float, peak: int | None) -> StageTiming:
    return StageTiming(
        stage=name, wall_seconds=seconds, cpu_seconds=2 * seconds, peak_rss_bytes=peak, started="unknown"
    )


GOOD = RunRecords(
    folder=Path("run"),
    validations={
        "base": validation("base", 0.2, 1.2),
        "adapter": validation("adapter", difficulty=DIFFICULTY),
        "merged": validation("merged"),
    },
    merge=merge(),
    weights=weights(),
    behaviour=behaviour(comparison(top1=1.0)).model_copy(update={"generation": WRITTEN}),
    contamination=ContaminationRecord(verdict="independent", rows_test=4, counts={"test_rows": 1}),
    comparison=ComparisonRecord(
        adapter_effect=EFFECT,
        adapter_effect_groups={
            "difficulty": {"hard": EFFECT.model_copy(update={"interval": None, "loss_delta": 0.3})}
        },
        merge_effect=EFFECT,
        weights_grade="exact",
        behaviour_grade="faithful",
        task_effects={
            "effect": [task_effect("f1", 0.9), task_effect("exact_match", 0.4)],
            "merge": [task_effect("exact_match", -0.1), task_effect("f1", 0.0)],
        },
    ),
    tasks={
        "base": answers("base", 0.2, 0.3),
        "adapter": answers("adapter", 0.6, 0.5),
        "merged": answers("merged", 0.5, 0.5),
    },
    timing=TimingRecord(
        hardware={}, price_per_hour=1.5, stages=[stage("merge", 600, 7), stage("compare", 1800, None)]
    ),
)


def with_adapter(result: ValidationResult) -> RunRecords:
    return replace(GOOD, validations={**GOOD.validations, "adapter": result})


def verdicts(measured: RunRecords) -> dict[str, str]:
    return {result.gate.name: result.verdict for result in evaluate(GUIDE_GATES, measured).gates}


def test_a_good_release_passes_every_gate_of_the_guide() -> None:
    record = evaluate(GUIDE_GATES, GOOD)
    assert record.passed
    assert set(verdicts(GOOD).values()) == {"pass"}


@pytest.mark.parametrize(
    ("failing", "measured"),
    [
        ("loss", with_adapter(validation("adapter", loss=0.10, difficulty=DIFFICULTY))),
        ("perplexity", with_adapter(validation("adapter", perplexity=2.0, difficulty=DIFFICULTY))),
        (
            "easy perplexity",
            with_adapter(validation("adapter", difficulty={**DIFFICULTY, "easy": metrics(0.4, 1.5)})),
        ),
        (
            "hard perplexity",
            with_adapter(validation("adapter", difficulty={**DIFFICULTY, "hard": metrics(1.1, 3.0)})),
        ),
        ("merge loss Δ", replace(GOOD, behaviour=behaviour(comparison(loss_delta=-1.74e-2, top1=1.0)))),
        (
            "merge perplexity Δ",
            replace(GOOD, behaviour=behaviour(comparison(perplexity_delta=-0.01, top1=1.0))),
        ),
        ("same outputs", replace(GOOD, behaviour=behaviour(comparison(top1=0.9999)))),
        ("weights", replace(GOOD, weights=weights("different"))),
    ],
)
def test_each_gate_fails_alone(failing: str, measured: RunRecords) -> None:
    found = verdicts(measured)
    assert found.pop(failing) == "fail"
    assert set(found.values()) == {"pass"}
    assert not evaluate(GUIDE_GATES, measured).passed


def test_a_group_without_examples_is_not_measured_and_does_not_pass() -> None:
    measured = with_adapter(validation("adapter", difficulty={"hard": metrics(1.0, 2.9)}))
    record = evaluate(GUIDE_GATES, measured)
    easy = next(result for result in record.gates if result.gate.name == "easy perplexity")
    assert (easy.verdict, easy.measured) == ("not measured", None)
    assert "difficulty=easy" in easy.reason
    assert not record.passed


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_measured_from_records_and_not_without_them(metric: str) -> None:
    word = metric.endswith((".grade", ".verdict"))
    group = "source=DROP" if "accuracy_delta_" in metric else None
    gate = Gate(name="g", metric=metric, group=group, comparison="!=", threshold="nothing" if word else -1.0)
    (with_records,) = evaluate([gate], GOOD).gates
    (without,) = evaluate([gate], RunRecords(Path("run"))).gates
    assert with_records.verdict == "pass"
    assert (without.verdict, without.measured) == ("not measured", None)
    assert without.reason


@pytest.mark.parametrize("metric", METRICS)
def test_a_gate_without_advice_gets_that_of_its_metric(metric: str) -> None:
    word = metric.endswith((".grade", ".verdict"))
    gate = Gate(name="g", metric=metric, comparison="==", threshold="nothing" if word else -5.0)
    (found,) = evaluate([gate], GOOD).gates
    assert found.verdict != "pass"
    assert len(found.gate.advice) > 20
    own = gate.model_copy(update={"advice": "ask Ada"})
    assert evaluate([own], GOOD).gates[0].gate == own


def test_advice_is_about_what_was_measured() -> None:
    def said(metric: str) -> str:
        return evaluate([Gate(name="g", metric=metric, threshold=-5.0)], GOOD).gates[0].gate.advice

    assert "versions" in said("merge.kl_mean")
    assert "--precision" in said("merge.swallowed_fraction")
    assert "--drop" in said("contamination.rows")
    assert "cheaper" in said("cost.dollars")


MERGES = {
    "nearest": ("give --train", "dithered"),
    "dithered": ("give --train", ""),
    "calibrated": ("calibrated already", ""),
}


@pytest.mark.parametrize("rounding", MERGES)
def test_advice_on_a_merge_names_only_what_was_not_done_yet(rounding: str) -> None:
    def said(**changes: object) -> str:
        run = replace(GOOD, merge=merge().model_copy(update={"rounding": rounding, **changes}))
        run = replace(run, contamination=ContaminationRecord(verdict="not checked"))
        return evaluate([Gate(name="g", metric="merge.loss_delta", threshold=-5.0)], run).gates[0].gate.advice

    wanted, other = MERGES[rounding]
    assert wanted in said() and "--precision float16 or float32" in said()
    assert ("--rounding dithered" in said()) == bool(other)
    if rounding == "calibrated":
        assert "--train" not in said()
    assert "--precision float32" in said(precision="float16")
    assert "--" not in said(precision="float32")


def test_a_run_with_training_rows_is_not_told_to_give_them() -> None:
    # `GOOD` has a checked test set: its training rows were given.
    run = replace(GOOD, merge=merge().model_copy(update={"rounding": "nearest"}))
    (result,) = evaluate([Gate(name="g", metric="merge.kl_mean", threshold=-5.0)], run).gates
    assert "--rounding calibrated" in result.gate.advice and "give --train" not in result.gate.advice


@pytest.mark.parametrize(
    ("verdict", "word"), [("helps", "the adapter helps"), ("no clear effect", "level"), ("hurts", "overfit")]
)
def test_advice_on_an_adapter_looks_at_its_base(verdict: str, word: str) -> None:
    assert GOOD.comparison
    effect = EFFECT.model_copy(update={"verdict": verdict})
    run = replace(GOOD, comparison=GOOD.comparison.model_copy(update={"adapter_effect": effect}))
    (result,) = evaluate([Gate(name="g", metric="adapter.loss", threshold=-5.0)], run).gates
    assert word in result.gate.advice
    assert ("overfit" in result.gate.advice) == (verdict == "hurts")


def test_contamination_is_a_listed_gate_where_the_test_set_was_checked() -> None:
    own = [Gate(name="loss", metric="adapter.loss", threshold=1.0)]
    assert [gate.name for gate in with_required(own, checked=False)] == ["loss", "weights"]
    listed = with_required(own, checked=True)
    assert [gate.name for gate in listed] == ["loss", "weights", "independent test set"]
    assert with_required(listed, checked=True) == listed
    contaminated = replace(GOOD, contamination=ContaminationRecord(verdict="contaminated", rows_test=4))
    failed = [result.gate.name for result in evaluate(listed, contaminated).gates if result.verdict != "pass"]
    assert failed == ["independent test set"]


@pytest.mark.parametrize(
    ("comparison_sign", "threshold", "expected"),
    [
        ("<", 0.05, "fail"),
        ("<=", 0.05, "pass"),
        (">", 0.05, "fail"),
        (">=", 0.05, "pass"),
        ("==", 0.05, "pass"),
    ],
)
def test_comparisons_at_the_threshold(comparison_sign: str, threshold: float, expected: str) -> None:
    gate = Gate(name="g", metric="adapter.loss", comparison=comparison_sign, threshold=threshold)  # type: ignore[arg-type]
    assert evaluate([gate], GOOD).gates[0].verdict == expected


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Gate(name="g", metric="adapter.lost", threshold=1.0), "adapter.lost"),
        (Gate(name="g", metric="adapter.loss", group="easy", threshold=1.0), "no '='"),
        (Gate(name="g", metric="adapter.loss", threshold="low"), "compares"),
        (Gate(name="g", metric="weights.grade", threshold=1.0), "compares"),
        (Gate(name="g", metric="weights.bound_ulps", group="source=MATH", threshold=1.0), "no group"),
        (Gate(name="g", metric="adapter.accuracy", group="difficulty=easy", threshold=1.0), "by source"),
        (Gate(name="g", metric="adapter.loss", group="stage=merge", threshold=1.0), "by stage"),
    ],
)
def test_a_wrong_gate_is_a_usage_error(gate: Gate, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate([gate], GOOD)


@pytest.mark.parametrize(
    ("metric", "group", "value"),
    [
        ("effect.loss_delta", None, -0.15),
        ("effect.loss_delta_high", None, -0.1),
        ("effect.loss_delta", "difficulty=hard", 0.3),
        ("adapter.accuracy", "source=DROP", 0.6),
        # 10 scored of DROP's exact match and 30 of MMLU.
        ("adapter.accuracy", None, (0.6 * 10 + 0.5 * 30) / 40),
        ("effect.accuracy_delta", "source=DROP", 0.4),
        ("merge.accuracy_delta", "source=DROP", -0.1),
        ("merge.accuracy_delta_low", "source=DROP", -0.2),
        ("merge.accuracy_delta", None, -0.1 * 10 / 40),
        ("merge.same_answers", None, 0.8),
        ("merge.swallowed_fraction", None, 0.5),
        ("contamination.rows", None, 1),
        ("contamination.fraction", None, 0.25),
        ("cost.wall_seconds", None, 2400.0),
        ("cost.wall_seconds", "stage=merge", 600.0),
        # Forty minutes at 1.50 an hour.
        ("cost.dollars", None, 1.0),
        ("cost.peak_memory_bytes", None, 7),
    ],
)
def test_relative_metrics_and_costs(metric: str, group: str | None, value: float) -> None:
    gate = Gate(name="g", metric=metric, group=group, threshold=0.0)
    assert evaluate([gate], GOOD).gates[0].measured == pytest.approx(value)


def test_a_relative_gate_carries_its_interval() -> None:
    gate = Gate(name="helps", metric="effect.loss_delta_high", threshold=0.0)
    assert evaluate([gate], GOOD).passed
    shown = evaluate([gate.model_copy(update={"metric": "effect.loss_delta"})], GOOD).gates[0]
    assert shown.interval == Interval(low=-0.2, high=-0.1)


@pytest.mark.parametrize(
    ("gate", "measured", "reason"),
    [
        ({"metric": "effect.loss_delta_low", "group": "difficulty=hard"}, GOOD, "too few examples"),
        ({"metric": "effect.loss_delta", "group": "source=MATH"}, GOOD, "no example in source=MATH"),
        ({"metric": "merge.accuracy_delta_low"}, GOOD, "by benchmark only"),
        ({"metric": "adapter.accuracy", "group": "source=GPQA"}, GOOD, "no scored answer"),
        (
            {"metric": "adapter.accuracy", "group": "source=MMLU"},
            replace(GOOD, tasks={"adapter": answers("adapter", 0.5, None)}),
            "no scored answer",
        ),
        ({"metric": "merge.accuracy_delta"}, replace(GOOD, tasks={}), "--tasks"),
        ({"metric": "merge.same_answers"}, replace(GOOD, behaviour=behaviour()), "no answers were generated"),
        (
            {"metric": "contamination.verdict", "comparison": "!=", "threshold": "contaminated"},
            replace(
                GOOD, contamination=ContaminationRecord(verdict="not checked", reason="no training file")
            ),
            "no training file",
        ),
        (
            {"metric": "behaviour.grade", "comparison": "!=", "threshold": "drifted"},
            replace(GOOD, behaviour=behaviour(grade="not measured")),
            "not measured",
        ),
        (
            {"metric": "cost.dollars"},
            replace(GOOD, timing=TimingRecord(hardware={}, stages=[stage("merge", 1, 1)])),
            "--price-per-hour",
        ),
        ({"metric": "cost.wall_seconds", "group": "stage=mrege"}, GOOD, "no stage 'mrege'"),
        ({"metric": "cost.peak_memory_bytes", "group": "stage=compare"}, GOOD, "peak of memory"),
    ],
)
def test_what_has_no_data_is_not_measured_and_says_why(
    gate: dict[str, str], measured: RunRecords, reason: str
) -> None:
    # The threshold would let every number pass.
    asked = Gate.model_validate({"name": "g", "threshold": 1e9, **gate})
    (found,) = evaluate([asked], measured).gates
    assert (found.verdict, found.measured) == ("not measured", None)
    assert reason in found.reason


def test_hits_are_counted_where_an_older_record_does_not() -> None:
    hits = [
        ContaminationHit(kind=kind, test_id="t", train_id="a", train_file="f", score=1.0)
        for kind in ("exact", "near")
    ]
    found = ContaminationRecord(verdict="contaminated", rows_test=4, hits=hits)
    gate = Gate(name="g", metric="contamination.rows", comparison="==", threshold=1)
    assert evaluate([gate], RunRecords(Path("run"), contamination=found)).passed


def test_costs_are_judged_apart() -> None:
    slow = Gate(name="time", metric="cost.wall_seconds", threshold=60)
    found, costs = split_costs([*GUIDE_GATES, slow])
    assert (found, costs) == (list(GUIDE_GATES), [slow])
    judged = replace(GOOD, gates=evaluate(found, GOOD))
    joined = replace(judged, cost_gates=evaluate(costs, GOOD)).judged
    assert joined
    assert [result.verdict for result in joined.gates] == ["pass"] * len(GUIDE_GATES) + ["fail"]
    assert not joined.passed
    assert judged.judged
    assert judged.judged.passed


def test_the_page_on_gates_names_every_metric() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gates.md").read_text()
    for metric in METRICS:
        subject, _, name = metric.partition(".")
        ends = [f"`{name}`", f".{name}`", f"`_{name.rpartition('_')[2]}`"]
        assert f"{subject}." in page
        assert any(end in page for end in ends), metric
