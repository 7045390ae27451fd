"""Three models side by side, and what the adapter changes, by group: rows with their place on an axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorasmith.files.run_layout import RunRecords
from lorasmith.records.proof import PairedEffect
from lorasmith.records.scoring import GroupMetrics
from lorasmith.reporting.figures import Axis, linear_axis, plain

ALL = "all examples"
_DIFFICULTY_ORDER = {"easy": 0, "medium": 1, "hard": 2}


@dataclass(frozen=True)
class Mark:
    """A value with its interval, in percent of an axis."""

    role: str
    at: float
    low: float | None
    high: float | None
    metrics: GroupMetrics


@dataclass(frozen=True)
class ModelRow:
    """One group with the models that were measured on it."""

    name: str
    examples: int
    tokens: int
    marks: list[Mark]


@dataclass(frozen=True)
class ModelTable:
    """One kind of group, such as `source`."""

    kind: str
    axis: Axis
    perplexities: list[tuple[float, str]]
    """Ticks of the upper scale: place in percent, label."""
    rows: list[ModelRow]


@dataclass(frozen=True)
class EffectRow:
    """What model B changes against model A in one group."""

    name: str
    effect: PairedEffect
    at: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class EffectTable:
    """One kind of group, with the place of zero."""

    kind: str
    axis: Axis
    zero: float
    rows: list[EffectRow]


def model_tables(records: RunRecords) -> list[ModelTable]:
    """Tables of losses by source, domain and difficulty, then by crossings; all examples lead each table."""
    results = records.validations
    kinds = list(dict.fromkeys(kind for result in results.values() for kind in result.groups))
    tables = []
    for kind in kinds or ([""] if results else []):
        names = {name for result in results.values() for name in result.groups.get(kind, {})}
        if is_idle(kind, len(names)):
            continue
        by_group: dict[str, dict[str, GroupMetrics]] = {
            ALL: {role: result.overall for role, result in results.items()}
        }
        for name in sort_groups(kind, names):
            by_group[name] = {
                role: result.groups[kind][name]
                for role, result in results.items()
                if name in result.groups.get(kind, {})
            }
        tables.append(_model_table(kind, by_group))
    return tables


def is_idle(kind: str, groups: int) -> bool:
    """Whether a kind of group is a crossing that divides nothing."""
    return "×" in kind and groups < 2


def sort_groups(kind: str, names: set[str]) -> list[str]:
    """Difficulties from easy to hard, everything else by name."""
    if kind == "difficulty":
        return sorted(names, key=lambda name: (_DIFFICULTY_ORDER.get(name, 3), name))
    return sorted(names, key=lambda name: (name.lower(), name))


def _model_table(kind: str, by_group: dict[str, dict[str, GroupMetrics]]) -> ModelTable:
    every = [metrics for roles in by_group.values() for metrics in roles.values()]
    values = [metrics.loss for metrics in every]
    for metrics in every:
        if metrics.interval:
            values += [metrics.interval.low, metrics.interval.high]
    axis = linear_axis(values)
    rows = []
    for name, roles in by_group.items():
        first = next(iter(roles.values()))
        marks = [
            Mark(
                role=role,
                at=axis.at(metrics.loss),
                low=axis.at(metrics.interval.low) if metrics.interval else None,
                high=axis.at(metrics.interval.high) if metrics.interval else None,
                metrics=metrics,
            )
            for role, metrics in roles.items()
        ]
        rows.append(ModelRow(name, first.examples, first.tokens, marks))
    return ModelTable(kind, axis, _perplexity_ticks(axis), rows)


def _perplexity_ticks(axis: Axis) -> list[tuple[float, str]]:
    """Round perplexities over an axis of losses, at least 9 % apart."""
    low, high = (math.exp(max(0.0, min(end, 600.0))) for end in (axis.low, axis.high))
    if high / low > 10:
        top = math.floor(math.log10(high)) + 1
        candidates = [step * 10.0**power for power in range(top) for step in (1.0, 1.5, 2.0, 3.0, 5.0)]
    else:
        candidates = list(linear_axis([low, high]).ticks)
    ticks: list[tuple[float, str]] = []
    for value in candidates:
        place = axis.at(math.log(value)) if value >= 1 else -1.0
        if 0 < place < 100 and (not ticks or place - ticks[-1][0] >= 9):
            ticks.append((place, plain(round(value, 12))))
    return ticks


def effect_tables(records: RunRecords) -> list[EffectTable]:
    """The adapter against its base, by kind of group; all examples lead each table."""
    comparison = records.comparison
    if comparison is None or comparison.adapter_effect is None:
        return []
    tables = []
    for kind, groups in (comparison.adapter_effect_groups or {"": {}}).items():
        if is_idle(kind, len(groups)):
            continue
        effects = {ALL: comparison.adapter_effect}
        effects.update({name: groups[name] for name in sort_groups(kind, set(groups))})
        spans = [effect.interval for effect in effects.values() if effect.interval]
        ends = [end for span in spans for end in (span.low, span.high)]
        axis = linear_axis(ends + [effect.loss_delta for effect in effects.values()], include=0.0)
        rows = [
            EffectRow(
                name,
                effect,
                axis.at(effect.loss_delta),
                axis.at(effect.interval.low) if effect.interval else None,
                axis.at(effect.interval.high) if effect.interval else None,
            )
            for name, effect in effects.items()
        ]
        tables.append(EffectTable(kind, axis, axis.at(0.0), rows))
    return tables
