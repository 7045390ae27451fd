"""What a gate may name: every metric, where it is read from, and which groups it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lorasmith.errors import UsageError
from lorasmith.files.run_layout import ROLES, RunRecords
from lorasmith.records.base import Interval
from lorasmith.records.dataset import ContaminationRecord
from lorasmith.records.proof import (
    BehaviourProof,
    PairedEffect,
    TokenComparison,
)
from lorasmith.records.release import Gate, StageTiming, TimingRecord
from lorasmith.records.scoring import GroupMetrics, TaskEffect, TaskMetric, ValidationResult

# Why a gate has no data.


class NotMeasured(Exception):
    """The value is not there; the message says why. Caught by `evaluate`, never shown as an error."""


# Accuracy on the benchmarks' own questions, as gates read it.


Read = Callable[[RunRecords, str | None], tuple[float | str, Interval | None]]

MAIN_METRICS = ("accuracy_norm", "accuracy", "exact_match", "prompt_strict", "pass@1", "f1")
"""A benchmark with several metrics is judged by the first of these that it has, else by its first one."""

_PAIRS = {"effect": ("adapter", "base"), "merge": ("merged", "adapter")}


def accuracy(role: str) -> Read:
    """A benchmark's main metric, 0..1; over all benchmarks weighted by their scored examples."""

    def read(records: RunRecords, group: str | None) -> tuple[float | str, Interval | None]:
        if role not in records.tasks:
            raise NotMeasured(f"the {role} model answered no benchmark questions (--tasks)")
        by_benchmark = _main(records.tasks[role].metrics)
        if group is None:
            return _mean([metric for metric in by_benchmark.values() if metric.value is not None]), None
        metric = by_benchmark.get(group.partition("=")[2])
        if metric is None or metric.value is None:
            raise NotMeasured(f"no scored answer in {group}")
        return metric.value, metric.interval

    return read


def differences(pair: str) -> dict[str, Read]:
    """`delta`, `delta_low`, `delta_high`: the second model's accuracy minus the first one's.

    One benchmark is paired example by example and has an interval; over all of them only `delta` is records.
    """
    other, first = _PAIRS[pair]

    def delta(records: RunRecords, group: str | None) -> tuple[float | str, Interval | None]:
        if group is None:
            (high, _), (low, _) = accuracy(other)(records, None), accuracy(first)(records, None)
            return float(high) - float(low), None
        effect = _task_effect(records, pair, group)
        return effect.delta, effect.interval

    def end(name: str) -> Read:
        def read(records: RunRecords, group: str | None) -> tuple[float | str, Interval | None]:
            if group is None:
                raise NotMeasured(
                    "an interval is measured by benchmark only: give the gate a group, source=…"
                )
            interval = _task_effect(records, pair, group).interval
            if interval is None:
                raise NotMeasured("there are too few examples for an interval")
            return float(getattr(interval, name)), None

        return read

    return {"delta": delta, "delta_low": end("low"), "delta_high": end("high")}


def _main(metrics: list[TaskMetric]) -> Mapping[str, TaskMetric]:
    ranks = {name: rank for rank, name in enumerate(MAIN_METRICS)}
    ordered = sorted(metrics, key=lambda metric: ranks.get(metric.metric, len(ranks)))
    return {metric.benchmark: metric for metric in reversed(ordered)}


def _mean(metrics: list[TaskMetric]) -> float:
    scored = sum(metric.scored for metric in metrics)
    if not scored:
        raise NotMeasured("no answer could be scored")
    return sum((metric.value or 0.0) * metric.scored for metric in metrics) / scored


def _task_effect(records: RunRecords, pair: str, group: str) -> TaskEffect:
    effects = records.comparison.task_effects.get(pair) if records.comparison else None
    if effects is None:
        both = " and ".join(_PAIRS[pair])
        raise NotMeasured(f"{both} did not both answer the benchmarks' questions (--tasks)")
    ranks = {name: rank for rank, name in enumerate(MAIN_METRICS)}
    wanted = group.partition("=")[2]
    candidates = [effect for effect in effects if effect.benchmark == wanted]
    if not candidates:
        raise NotMeasured(f"no answer that both models have in {group}")
    return min(candidates, key=lambda effect: ranks.get(effect.metric, len(ranks)))


T = TypeVar("T")
Value = tuple[float | str, Interval | None]
"""A measured value, and its interval where it has one."""

_GROUPS = ("source", "domain", "difficulty")


@dataclass(frozen=True)
class Metric:
    """One metric: how it is read, by which kinds of group, and whether it is a word."""

    read: Callable[[RunRecords, str | None], Value]
    groups: tuple[str, ...] = ()
    """Kinds that may stand before the `=` of a gate's group; `source` admits crossings with it as well."""
    word: bool = False

    def check(self, gate: Gate) -> None:
        """Raise `UsageError` for a group or a threshold that this metric cannot have."""
        if self.word != isinstance(gate.threshold, str):
            raise UsageError(
                f"gate {gate.name!r} compares {gate.metric} with {gate.threshold!r}",
                expected="a word for grades and verdicts, a number for everything else",
            )
        if gate.group is None:
            return
        kind, equals, _ = gate.group.partition("=")
        if not equals:
            raise UsageError(
                f"group {gate.group!r} has no '='", expected="such as difficulty=easy or source=MATH"
            )
        if kind not in self.groups and not ("×" in kind and self.groups[: len(_GROUPS)] == _GROUPS):
            known = f"a group by {', '.join(self.groups)}" if self.groups else "no group"
            raise UsageError(f"gate {gate.name!r}: {gate.metric} is not measured by {kind}", expected=known)


def _pick(groups: Mapping[str, Mapping[str, T]], group: str) -> T:
    kind, _, value = group.partition("=")
    metrics = groups.get(kind, {}).get(value)
    if metrics is None:
        raise NotMeasured(f"no example in {group}: score some, or leave this gate out")
    return metrics


def _validation(role: str, read: Callable[[GroupMetrics], Value]) -> Metric:
    def value(records: RunRecords, group: str | None) -> Value:
        result: ValidationResult | None = records.validations.get(role)
        if result is None:
            raise NotMeasured(f"the {role} model was not validated")
        return read(result.overall if group is None else _pick(result.groups, group))

    return Metric(value, (*_GROUPS, "turn"))


def _behaviour(read: Callable[[TokenComparison], float]) -> Metric:
    def value(records: RunRecords, group: str | None) -> Value:
        if records.behaviour is None:
            raise NotMeasured("the comparison did not run")
        proof = records.behaviour
        return read(proof.overall if group is None else _pick(proof.groups, group)), None

    return Metric(value, _GROUPS)


def _effect(read: Callable[[PairedEffect], Value], *, word: bool = False) -> Metric:
    def value(records: RunRecords, group: str | None) -> Value:
        record = records.comparison
        if record is None or record.adapter_effect is None:
            raise NotMeasured("the adapter was not compared with its base")
        return read(record.adapter_effect if group is None else _pick(record.adapter_effect_groups, group))

    return Metric(value, _GROUPS, word=word)


def _end(interval: Interval | None, end: str) -> float:
    if interval is None:
        raise NotMeasured("there are too few examples for an interval")
    bound: float = getattr(interval, end)
    return bound


def _record(name: str, what: str, read: Callable[..., float | str], *, word: bool = False) -> Metric:
    def value(records: RunRecords, group: str | None) -> Value:
        record = getattr(records, name)
        if record is None:
            raise NotMeasured(f"{what} did not run")
        return read(record), None

    return Metric(value, word=word)


def _same_answers(proof: BehaviourProof) -> float:
    if proof.generation is None:
        raise NotMeasured("no answers were generated for the comparison (--generate)")
    return proof.generation.same_fraction


def _grade(proof: BehaviourProof) -> str:
    if proof.grade == "not measured":
        raise NotMeasured("; ".join(proof.reasons) or "the behaviour was not measured")
    return proof.grade


def _contaminated(read: Callable[[ContaminationRecord], float | str], *, word: bool = False) -> Metric:
    def value(record: ContaminationRecord) -> float | str:
        if record.verdict == "not checked":
            raise NotMeasured(record.reason or "the test set was not checked")
        return read(record)

    return _record("contamination", "the contamination check", value, word=word)


def _hit_rows(record: ContaminationRecord) -> int:
    return record.counts.get("test_rows", len({hit.test_id for hit in record.hits}))


def _cost(read: Callable[[TimingRecord, list[StageTiming]], float]) -> Metric:
    def value(records: RunRecords, group: str | None) -> Value:
        if records.timing is None:
            raise NotMeasured("no times were recorded")
        name = None if group is None else group.partition("=")[2]
        stages = [stage for stage in records.timing.stages if name in (None, stage.stage)]
        if not stages:
            raise NotMeasured(f"no stage {name!r} was timed" if name else "no stage was timed")
        return read(records.timing, stages), None

    return Metric(value, ("stage",))


def _wall(stages: list[StageTiming]) -> float:
    return sum(stage.wall_seconds for stage in stages)


def _dollars(timing: TimingRecord, stages: list[StageTiming]) -> float:
    if timing.price_per_hour is None:
        raise NotMeasured("the price of an hour is not known (--price-per-hour)")
    # Attempts that came to no end are nobody's stage, but were paid for.
    lost = timing.unfinished_seconds if len(stages) == len(timing.stages) else 0.0
    return timing.price_per_hour * (_wall(stages) + lost) / 3600


def _peak(timing: TimingRecord, stages: list[StageTiming]) -> float:
    peaks = [stage.peak_rss_bytes for stage in stages if stage.peak_rss_bytes is not None]
    if not peaks:
        raise NotMeasured("this system does not tell the peak of memory")
    return max(peaks)


METRICS: dict[str, Metric] = {
    **{f"{role}.loss": _validation(role, lambda m: (m.loss, m.interval)) for role in ROLES},
    **{f"{role}.loss_high": _validation(role, lambda m: (_end(m.interval, "high"), None)) for role in ROLES},
    **{f"{role}.perplexity": _validation(role, lambda m: (m.perplexity, None)) for role in ROLES},
    **{f"{role}.examples": _validation(role, lambda m: (m.examples, None)) for role in ROLES},
    **{f"{role}.accuracy": Metric(accuracy(role), ("source",)) for role in ROLES},
    "effect.loss_delta": _effect(lambda effect: (effect.loss_delta, effect.interval)),
    "effect.loss_delta_low": _effect(lambda effect: (_end(effect.interval, "low"), None)),
    "effect.loss_delta_high": _effect(lambda effect: (_end(effect.interval, "high"), None)),
    "effect.perplexity_delta": _effect(lambda effect: (effect.perplexity_delta, None)),
    "effect.verdict": _effect(lambda effect: (effect.verdict, None), word=True),
    **{
        f"{pair}.accuracy_{name}": Metric(read, ("source",))
        for pair in ("effect", "merge")
        for name, read in differences(pair).items()
    },
    "merge.loss_delta": _behaviour(lambda compared: abs(compared.loss_delta)),
    "merge.perplexity_delta": _behaviour(lambda compared: abs(compared.perplexity_delta)),
    "merge.kl_mean": _behaviour(lambda compared: compared.kl.mean),
    "merge.kl_q999": _behaviour(lambda compared: compared.kl.q999),
    "merge.kl_max": _behaviour(lambda compared: compared.kl.max),
    "merge.top1_agreement": _behaviour(lambda compared: compared.top1_agreement),
    "merge.same_answers": _record("behaviour", "the comparison", _same_answers),
    "merge.swallowed_fraction": _record("merge", "the merge", lambda record: record.swallowed_fraction),
    "weights.grade": _record("weights", "the proof of the weights", lambda proof: proof.grade, word=True),
    "weights.bound_ulps": _record("weights", "the proof of the weights", lambda proof: proof.bound_ulps),
    "behaviour.grade": _record("behaviour", "the comparison", _grade, word=True),
    "contamination.verdict": _contaminated(lambda record: record.verdict, word=True),
    "contamination.rows": _contaminated(_hit_rows),
    "contamination.fraction": _contaminated(lambda record: _hit_rows(record) / max(1, record.rows_test)),
    "cost.wall_seconds": _cost(lambda timing, stages: _wall(stages)),
    "cost.cpu_seconds": _cost(lambda timing, stages: sum(stage.cpu_seconds for stage in stages)),
    "cost.peak_memory_bytes": _cost(_peak),
    "cost.dollars": _cost(_dollars),
}
"""Every metric that a gate may name.

Loss and perplexity deltas of `merge.*` are absolute values. `effect.*` is the adapter minus the base
(negative is better for losses), `merge.accuracy_*` the merged model minus the adapter, both with their sign.
"""
