"""Each gate with its measured value and verdict."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping

from lorasmith.errors import UsageError
from lorasmith.files.run_layout import RunRecords
from lorasmith.gates.advice import advise
from lorasmith.gates.metrics import METRICS, NotMeasured
from lorasmith.records.release import Gate, GateRecord, GateResult

_COMPARE: Mapping[str, Callable[..., bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def evaluate(gates: Iterable[Gate], records: RunRecords) -> GateRecord:
    """Each gate with its measured value, interval and verdict, and with advice (see `gates/advice.py`).

    Raises `UsageError` for a metric or a kind of group that does not exist, or a threshold of the wrong type.
    """
    return GateRecord.of(_evaluate(gate, records) for gate in gates)


def check_gates(gates: Iterable[Gate]) -> None:
    """Raise what `evaluate` would raise, before there is anything to measure."""
    for gate in gates:
        METRICS[_known(gate)].check(gate)


def split_costs(gates: Iterable[Gate]) -> tuple[list[Gate], list[Gate]]:
    """Gates on what was found, and gates on what it cost.

    Costs change from run to run: their verdicts must not stand in records that are equal between runs.
    """
    known = list(gates)
    costs = [gate for gate in known if gate.metric.startswith("cost.")]
    return [gate for gate in known if gate not in costs], costs


def _evaluate(gate: Gate, records: RunRecords) -> GateResult:
    metric = METRICS[_known(gate)]
    metric.check(gate)
    gate = gate if gate.advice else gate.model_copy(update={"advice": advise(gate.metric, records)})
    try:
        value, interval = metric.read(records, gate.group)
    except NotMeasured as missing:
        return GateResult(gate=gate, measured=None, verdict="not measured", reason=str(missing))
    passed = _COMPARE[gate.comparison](value, gate.threshold)
    return GateResult(gate=gate, measured=value, interval=interval, verdict="pass" if passed else "fail")


def _known(gate: Gate) -> str:
    if gate.metric not in METRICS:
        raise UsageError(
            f"gate {gate.name!r} names a metric that does not exist: {gate.metric!r}",
            expected=f"one of {', '.join(METRICS)}",
        )
    return gate.metric


# The success criteria of a release: generalisation of the adapter, and fidelity of the merge.


_WEIGHTS = Gate(name="weights", metric="weights.grade", comparison="!=", threshold="different")
_INDEPENDENCE = Gate(
    name="independent test set",
    metric="contamination.verdict",
    comparison="!=",
    threshold="contaminated",
)

GUIDE_GATES: tuple[Gate, ...] = (
    Gate(name="loss", metric="adapter.loss", threshold=0.10),
    Gate(name="perplexity", metric="adapter.perplexity", threshold=2.0),
    Gate(name="easy perplexity", metric="adapter.perplexity", group="difficulty=easy", threshold=1.5),
    Gate(name="hard perplexity", metric="adapter.perplexity", group="difficulty=hard", threshold=3.0),
    Gate(name="merge loss Δ", metric="merge.loss_delta", threshold=1e-4),
    Gate(name="merge perplexity Δ", metric="merge.perplexity_delta", threshold=0.01),
    Gate(name="same outputs", metric="merge.top1_agreement", comparison=">=", threshold=1.0),
    _WEIGHTS,
)
"""The default gates, in the order of the procedure. `same outputs`: after every prefix of every response,
adapter and merged model prefer the same next token."""


def with_required(gates: Iterable[Gate], *, checked: bool) -> list[Gate]:
    """The gates, and those that no run is without: right weights, and no training row in the test set.

    The latter only where the test set was `checked`: without training rows there is nothing to judge by.
    Whatever makes a run end with exit code 1 is thereby listed, wherever gates are shown.
    """
    listed = list(gates)
    known = {(gate.metric, gate.group, gate.comparison, gate.threshold) for gate in listed}
    for gate in (_WEIGHTS, *((_INDEPENDENCE,) if checked else ())):
        if (gate.metric, gate.group, gate.comparison, gate.threshold) not in known:
            listed.append(gate)
    return listed


def budget_gate(limit: float) -> Gate:
    """The gate of `--budget`, in dollars. It stays out of `run.json`, which money must not change."""
    return Gate(name="--budget", metric="cost.dollars", comparison="<=", threshold=limit)
