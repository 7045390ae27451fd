"""Accuracy on the benchmarks' own questions, as gates read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lorasmith.gates.missing import NotMeasured
from lorasmith.records.base import Interval
from lorasmith.records.scoring import TaskEffect, TaskMetric

if TYPE_CHECKING:
    from lorasmith.gates.metrics import Measured

Read = Callable[["Measured", str | None], tuple[float | str, Interval | None]]

MAIN_METRICS = ("accuracy", "exact_match", "pass@1", "f1")
"""A benchmark with several metrics is judged by the first of these that it has."""

_PAIRS = {"effect": ("adapter", "base"), "merge": ("merged", "adapter")}


def accuracy(role: str) -> Read:
    """A benchmark's main metric, 0..1; over all benchmarks weighted by their scored examples."""

    def read(measured: Measured, group: str | None) -> tuple[float | str, Interval | None]:
        if role not in measured.tasks:
            raise NotMeasured(f"the {role} model answered no benchmark questions (--tasks)")
        found = _main(measured.tasks[role].metrics)
        if group is None:
            return _mean([metric for metric in found.values() if metric.value is not None]), None
        metric = found.get(group.partition("=")[2])
        if metric is None or metric.value is None:
            raise NotMeasured(f"no scored answer in {group}")
        return metric.value, metric.interval

    return read


def differences(pair: str) -> dict[str, Read]:
    """`delta`, `delta_low`, `delta_high`: the second model's accuracy minus the first one's.

    One benchmark is paired example by example and has an interval; over all of them only `delta` is measured.
    """
    other, first = _PAIRS[pair]

    def delta(measured: Measured, group: str | None) -> tuple[float | str, Interval | None]:
        if group is None:
            (high, _), (low, _) = accuracy(other)(measured, None), accuracy(first)(measured, None)
            return float(high) - float(low), None
        effect = _effect(measured, pair, group)
        return effect.delta, effect.interval

    def end(name: str) -> Read:
        def read(measured: Measured, group: str | None) -> tuple[float | str, Interval | None]:
            if group is None:
                raise NotMeasured(
                    "an interval is measured by benchmark only: give the gate a group, source=…"
                )
            interval = _effect(measured, pair, group).interval
            if interval is None:
                raise NotMeasured("there are too few examples for an interval")
            return float(getattr(interval, name)), None

        return read

    return {"delta": delta, "delta_low": end("low"), "delta_high": end("high")}


def _main(metrics: list[TaskMetric]) -> Mapping[str, TaskMetric]:
    ranks = {name: rank for rank, name in enumerate(MAIN_METRICS)}
    ordered = sorted(metrics, key=lambda metric: ranks.get(metric.metric, len(ranks)), reverse=True)
    return {metric.benchmark: metric for metric in ordered}


def _mean(metrics: list[TaskMetric]) -> float:
    scored = sum(metric.scored for metric in metrics)
    if not scored:
        raise NotMeasured("no answer could be scored")
    return sum((metric.value or 0.0) * metric.scored for metric in metrics) / scored


def _effect(measured: Measured, pair: str, group: str) -> TaskEffect:
    if pair not in measured.task_effects:
        both = " and ".join(_PAIRS[pair])
        raise NotMeasured(f"{both} did not both answer the benchmarks' questions (--tasks)")
    ranks = {name: rank for rank, name in enumerate(MAIN_METRICS)}
    wanted = group.partition("=")[2]
    found = [effect for effect in measured.task_effects[pair] if effect.benchmark == wanted]
    if not found:
        raise NotMeasured(f"no answer that both models have in {group}")
    return min(found, key=lambda effect: ranks.get(effect.metric, len(ranks)))
