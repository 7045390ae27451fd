"""Gates: named thresholds on measured values, as data; what is not measured has not passed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lorasmith.errors import UsageError
from lorasmith.records.dataset import ContaminationRecord
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, TokenComparison, WeightProof
from lorasmith.records.release import Gate, GateRecord, GateResult
from lorasmith.records.scoring import GroupMetrics, ValidationResult

_RETRAIN = "the adapter may have overfit: train again with more regularisation, or accept it for diverse data"
_REMERGE = "merge again at higher precision (--precision float16 or float32), and check library versions"

GUIDE_GATES: tuple[Gate, ...] = (
    Gate(name="loss", metric="adapter.loss", threshold=0.10, advice=_RETRAIN),
    Gate(name="perplexity", metric="adapter.perplexity", threshold=2.0, advice=_RETRAIN),
    Gate(
        name="easy perplexity",
        metric="adapter.perplexity",
        group="difficulty=easy",
        threshold=1.5,
        advice=_RETRAIN,
    ),
    Gate(
        name="hard perplexity",
        metric="adapter.perplexity",
        group="difficulty=hard",
        threshold=3.0,
        advice=_RETRAIN,
    ),
    Gate(name="merge loss Δ", metric="merge.loss_delta", threshold=1e-4, advice=_REMERGE),
    Gate(name="merge perplexity Δ", metric="merge.perplexity_delta", threshold=0.01, advice=_REMERGE),
    Gate(
        name="weights",
        metric="weights.grade",
        comparison="!=",
        threshold="different",
        advice="the merged folder is not this merge: look at the first differences, then merge again",
    ),
)
"""The success criteria of a release: generalisation of the adapter, and fidelity of the merge."""

T = TypeVar("T")

_COMPARE: Mapping[str, Callable[..., bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Measured:
    """The records that gates read; None where a stage did not run."""

    base: ValidationResult | None = None
    adapter: ValidationResult | None = None
    merged: ValidationResult | None = None
    merge: MergeRecord | None = None
    weights: WeightProof | None = None
    behaviour: BehaviourProof | None = None
    contamination: ContaminationRecord | None = None


_VALIDATION: Mapping[str, Callable[[GroupMetrics], float]] = {
    "loss": lambda metrics: metrics.loss,
    "perplexity": lambda metrics: metrics.perplexity,
    "examples": lambda metrics: metrics.examples,
}

_BEHAVIOUR: Mapping[str, Callable[[TokenComparison], float]] = {
    "loss_delta": lambda found: abs(found.loss_delta),
    "perplexity_delta": lambda found: abs(found.perplexity_delta),
    "kl_mean": lambda found: found.kl.mean,
    "kl_q999": lambda found: found.kl.q999,
    "kl_max": lambda found: found.kl.max,
    "top1_agreement": lambda found: found.top1_agreement,
}

METRICS: tuple[str, ...] = (
    *(f"{role}.{name}" for role in ("base", "adapter", "merged") for name in _VALIDATION),
    *(f"merge.{name}" for name in _BEHAVIOUR),
    "merge.swallowed_fraction",
    "weights.grade",
    "behaviour.grade",
    "contamination.verdict",
)
"""Every metric that a gate may name. Deltas are absolute values."""


def evaluate(gates: Iterable[Gate], measured: Measured) -> GateRecord:
    """Each gate with its measured value and verdict.

    Raises `UsageError` for a metric that does not exist, or a threshold of the wrong type.
    """
    results = [_evaluate(gate, measured) for gate in gates]
    return GateRecord(passed=all(result.verdict == "pass" for result in results), gates=results)


def _evaluate(gate: Gate, measured: Measured) -> GateResult:
    value, reason = _measure(gate, measured)
    if value is None:
        return GateResult(gate=gate, measured=None, verdict="not measured", reason=reason)
    if isinstance(value, str) != isinstance(gate.threshold, str):
        raise UsageError(
            f"gate {gate.name!r} compares {value!r} with {gate.threshold!r}",
            expected="a word for grades and verdicts, a number for everything else",
        )
    passed = _COMPARE[gate.comparison](value, gate.threshold)
    return GateResult(gate=gate, measured=value, verdict="pass" if passed else "fail")


def _measure(gate: Gate, measured: Measured) -> tuple[float | str | None, str]:
    """The value, or None and why there is none."""
    if gate.metric not in METRICS:
        raise UsageError(
            f"gate {gate.name!r} names a metric that does not exist: {gate.metric!r}",
            expected=f"one of {', '.join(METRICS)}",
        )
    subject, _, name = gate.metric.partition(".")
    if subject in ("base", "adapter", "merged"):
        return _from_validation(getattr(measured, subject), subject, name, gate.group)
    if gate.metric == "merge.swallowed_fraction":
        return _plain(measured.merge, lambda record: record.swallowed_fraction, "the merge")
    if subject == "merge":
        return _from_behaviour(measured.behaviour, name, gate.group)
    if subject == "weights":
        return _plain(measured.weights, lambda record: record.grade, "the proof of the weights")
    if subject == "behaviour":
        return _plain(measured.behaviour, lambda record: record.grade, "the comparison")
    return _plain(measured.contamination, lambda record: record.verdict, "the contamination check")


def _plain(record: object, read: Callable[..., float | str], what: str) -> tuple[float | str | None, str]:
    return (None, f"{what} did not run") if record is None else (read(record), "")


def _from_validation(
    result: ValidationResult | None, role: str, name: str, group: str | None
) -> tuple[float | None, str]:
    if result is None:
        return None, f"the {role} model was not validated"
    if group is None:
        return _VALIDATION[name](result.overall), ""
    metrics = _pick(result.groups, group)
    return (None, f"no example in {group}") if metrics is None else (_VALIDATION[name](metrics), "")


def _from_behaviour(proof: BehaviourProof | None, name: str, group: str | None) -> tuple[float | None, str]:
    if proof is None:
        return None, "the comparison did not run"
    if group is None:
        return _BEHAVIOUR[name](proof.overall), ""
    found = _pick(proof.groups, group)
    return (None, f"no example in {group}") if found is None else (_BEHAVIOUR[name](found), "")


def _pick(groups: Mapping[str, Mapping[str, T]], group: str) -> T | None:
    kind, equals, value = group.partition("=")
    if not equals:
        raise UsageError(f"group {group!r} has no '='", expected="such as difficulty=easy or source=MATH")
    return groups.get(kind, {}).get(value)
