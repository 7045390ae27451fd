"""Each gate with its measured value and verdict."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping

from lorasmith.errors import UsageError
from lorasmith.gates.advice import with_advice
from lorasmith.gates.metrics import METRICS, Measured
from lorasmith.gates.missing import NotMeasured
from lorasmith.records.release import Gate, GateRecord, GateResult

_COMPARE: Mapping[str, Callable[..., bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def evaluate(gates: Iterable[Gate], measured: Measured) -> GateRecord:
    """Each gate with its measured value, interval and verdict, and with advice (see `gates.advice`).

    Raises `UsageError` for a metric or a kind of group that does not exist, or a threshold of the wrong type.
    """
    return _record([_evaluate(gate, measured) for gate in gates])


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


def join(*records: GateRecord | None) -> GateRecord:
    """The gates of several records as one."""
    return _record([result for record in records if record for result in record.gates])


def _record(results: list[GateResult]) -> GateRecord:
    return GateRecord(passed=all(result.verdict == "pass" for result in results), gates=results)


def _evaluate(gate: Gate, measured: Measured) -> GateResult:
    metric = METRICS[_known(gate)]
    metric.check(gate)
    gate = with_advice(gate)
    try:
        value, interval = metric.read(measured, gate.group)
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
