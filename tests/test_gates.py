"""Gates: the guide's criteria pass and fail where they should, and nothing passes unmeasured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorasmith.errors import UsageError
from lorasmith.gates import GUIDE_GATES, METRICS, Measured, evaluate
from lorasmith.records.dataset import ContaminationRecord
from lorasmith.records.release import Gate
from tests.records_for_tests import behaviour, comparison, merge, metrics, validation, weights

DIFFICULTY = {"easy": metrics(0.3, 1.4), "hard": metrics(1.0, 2.9)}
GOOD = Measured(
    base=validation("base", 0.2, 1.2),
    adapter=validation("adapter", difficulty=DIFFICULTY),
    merged=validation("merged"),
    merge=merge(),
    weights=weights(),
    behaviour=behaviour(),
    contamination=ContaminationRecord(verdict="independent"),
)


def verdicts(measured: Measured) -> dict[str, str]:
    return {result.gate.name: result.verdict for result in evaluate(GUIDE_GATES, measured).gates}


def test_a_good_release_passes_every_gate_of_the_guide() -> None:
    record = evaluate(GUIDE_GATES, GOOD)
    assert record.passed
    assert set(verdicts(GOOD).values()) == {"pass"}


@pytest.mark.parametrize(
    ("failing", "measured"),
    [
        ("loss", replace(GOOD, adapter=validation("adapter", loss=0.10, difficulty=DIFFICULTY))),
        ("perplexity", replace(GOOD, adapter=validation("adapter", perplexity=2.0, difficulty=DIFFICULTY))),
        (
            "easy perplexity",
            replace(
                GOOD, adapter=validation("adapter", difficulty={**DIFFICULTY, "easy": metrics(0.4, 1.5)})
            ),
        ),
        (
            "hard perplexity",
            replace(
                GOOD, adapter=validation("adapter", difficulty={**DIFFICULTY, "hard": metrics(1.1, 3.0)})
            ),
        ),
        ("merge loss Δ", replace(GOOD, behaviour=behaviour(comparison(loss_delta=-1.74e-2)))),
        ("merge perplexity Δ", replace(GOOD, behaviour=behaviour(comparison(perplexity_delta=-0.01)))),
        ("weights", replace(GOOD, weights=weights("different"))),
    ],
)
def test_each_gate_fails_alone(failing: str, measured: Measured) -> None:
    found = verdicts(measured)
    assert found.pop(failing) == "fail"
    assert set(found.values()) == {"pass"}
    assert not evaluate(GUIDE_GATES, measured).passed


def test_a_group_without_examples_is_not_measured_and_does_not_pass() -> None:
    measured = replace(GOOD, adapter=validation("adapter", difficulty={"hard": metrics(1.0, 2.9)}))
    record = evaluate(GUIDE_GATES, measured)
    easy = next(result for result in record.gates if result.gate.name == "easy perplexity")
    assert (easy.verdict, easy.measured) == ("not measured", None)
    assert "difficulty=easy" in easy.reason
    assert not record.passed


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_measured_from_records_and_not_without_them(metric: str) -> None:
    word = metric.endswith((".grade", ".verdict"))
    gate = Gate(name="g", metric=metric, comparison="!=", threshold="nothing" if word else -1.0)
    (with_records,) = evaluate([gate], GOOD).gates
    (without,) = evaluate([gate], Measured()).gates
    assert with_records.verdict == "pass"
    assert (without.verdict, without.measured) == ("not measured", None)
    assert without.reason


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
    ],
)
def test_a_wrong_gate_is_a_usage_error(gate: Gate, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate([gate], GOOD)
