"""The benchmarks' own metrics: three models side by side, with what adapter and merge change."""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.records.scoring import TaskEffect, TaskMetric
from lorasmith.reporting.figures import Axis, linear_axis
from lorasmith.reporting.load import RunRecords


@dataclass(frozen=True)
class TaskMark:
    """One model's value with its interval, in percent of the axis."""

    role: str
    at: float
    low: float | None
    high: float | None
    metric: TaskMetric


@dataclass(frozen=True)
class TaskRow:
    """One metric of one benchmark."""

    benchmark: str
    metric: str
    method: str
    examples: int
    marks: list[TaskMark]
    unscored: list[tuple[str, TaskMetric]]
    """Roles with answers that have no verdict, or that the limit of tokens cut off."""
    effect: TaskEffect | None
    """Adapter against base."""
    merge: TaskEffect | None
    """Merged against adapter."""


@dataclass(frozen=True)
class TaskTable:
    """All benchmarks on one axis from 0 to 1."""

    axis: Axis
    roles: list[str]
    rows: list[TaskRow]


def task_table(records: RunRecords) -> TaskTable | None:
    """None where no model answered the benchmarks' questions."""
    if not records.tasks:
        return None
    axis = linear_axis([0.0, 1.0])
    found: dict[tuple[str, str], dict[str, TaskMetric]] = {}
    for role, result in records.tasks.items():
        for metric in result.metrics:
            found.setdefault((metric.benchmark, metric.metric), {})[role] = metric
    effects = records.comparison.task_effects if records.comparison else {}
    rows = [
        TaskRow(
            benchmark=benchmark,
            metric=name,
            method=next(iter(roles.values())).method,
            examples=max(metric.examples for metric in roles.values()),
            marks=[_mark(axis, role, metric) for role, metric in roles.items() if metric.value is not None],
            unscored=[
                (role, metric) for role, metric in roles.items() if metric.unscored or metric.hit_limit
            ],
            effect=_effect(effects.get("effect", []), benchmark, name),
            merge=_effect(effects.get("merge", []), benchmark, name),
        )
        for (benchmark, name), roles in sorted(found.items())
    ]
    return TaskTable(axis, list(records.tasks), rows)


def _mark(axis: Axis, role: str, metric: TaskMetric) -> TaskMark:
    span = metric.interval
    return TaskMark(
        role,
        axis.at(metric.value or 0.0),
        axis.at(span.low) if span else None,
        axis.at(span.high) if span else None,
        metric,
    )


def _effect(effects: list[TaskEffect], benchmark: str, metric: str) -> TaskEffect | None:
    return next((one for one in effects if (one.benchmark, one.metric) == (benchmark, metric)), None)
