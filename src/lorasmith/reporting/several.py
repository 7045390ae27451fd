"""Several runs on one page: what differs between them, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import UsageError
from lorasmith.files.atomic import write_bytes
from lorasmith.files.run_layout import RunRecords
from lorasmith.records.scoring import GroupMetrics
from lorasmith.reporting.figures import Axis, linear_axis, log_axis, number, plural
from lorasmith.reporting.groups import ALL, is_idle, sort_groups
from lorasmith.reporting.page import report_records, require_own_page
from lorasmith.reporting.sections import Claim, claims, provenance, render_page

COLOURS = 8
"""Runs beyond this share colours; their names stand beside every mark all the same."""


@dataclass(frozen=True)
class NamedRun:
    """A run with the name and the number it has on this page."""

    name: str
    number: int
    records: RunRecords
    claims: list[Claim]

    @property
    def colour(self) -> str:
        """Its class."""
        return f"run-{self.number % COLOURS}"

    @property
    def seconds(self) -> float | None:
        """Wall time of all steps."""
        timing = self.records.timing
        return sum(stage.wall_seconds for stage in timing.stages) if timing else None


@dataclass(frozen=True)
class RunMark:
    """One run's value in one group, in percent of the axis."""

    run: NamedRun
    at: float
    low: float | None
    high: float | None
    value: float


@dataclass(frozen=True)
class RunTable:
    """A kind of group: its rows hold one mark for each run that measured the group."""

    kind: str
    axis: Axis
    rows: list[tuple[str, list[RunMark]]]


def write_comparison(runs: Sequence[Path], output: Path, *, timings: bool = True) -> None:
    """Write one page that compares several run folders, from their records alone.

    Raises `UsageError` for fewer than two runs, and what `report_records` raises.
    """
    if len(runs) < 2:
        raise UsageError("there is nothing to compare", expected="two or more runs")
    require_own_page(output)
    named = _name(runs, timings)
    warnings = _warnings(named)
    view: dict[str, Any] = {
        "headline": _headline(named, comparable=not warnings),
        "runs": named,
        "losses": {role: _loss_tables(named, role) for role in ("adapter", "merged")},
        "divergence": _divergence(named),
        "differences": differences(named),
        "warnings": warnings,
        "sections": _SECTIONS,
    }
    write_bytes(output, render_page("several.html", view).encode())


_SECTIONS = [
    ("summary", "Summary"),
    ("losses", "Losses"),
    ("merges", "Merges"),
    ("differences", "Differences"),
]


def _name(runs: Sequence[Path], timings: bool) -> list[NamedRun]:
    """The folders' names; where two are equal, with the folder above."""
    resolved = [run.resolve() for run in runs]
    times = Counter(run.name for run in resolved)
    named = []
    for place, run in enumerate(resolved):
        name = run.name if times[run.name] == 1 else f"{run.parent.name}/{run.name}"
        records = report_records(run, timings=timings)
        named.append(NamedRun(name, place, records, claims(records)))
    return named


def _headline(runs: list[NamedRun], *, comparable: bool) -> str:
    """Which run has the lowest loss and which the most faithful merge, as far as they are comparable."""
    parts = []
    losses = {
        run.name: run.records.validations["adapter"].overall.loss
        for run in runs
        if "adapter" in run.records.validations
    }
    if comparable and len(losses) > 1 and len(set(losses.values())) > 1:
        best = min(losses, key=lambda name: losses[name])
        parts.append(f"{best} has the lowest adapter loss ({number(losses[best], 4)})")
    merges = {run.name: run.records.behaviour.overall.kl.mean for run in runs if run.records.behaviour}
    if comparable and len(merges) > 1 and len(set(merges.values())) > 1:
        best = min(merges, key=lambda name: merges[name])
        parts.append(f"{best} has the most faithful merge (mean KL {number(merges[best])})")
    sentence = f"{plural(len(runs), 'run')} compared"
    return f"{sentence}: {', and '.join(parts)}." if parts else f"{sentence}."


def _loss_tables(runs: list[NamedRun], role: str) -> list[RunTable]:
    results = {run.number: run.records.validations.get(role) for run in runs}
    kinds = list(dict.fromkeys(kind for result in results.values() if result for kind in result.groups))
    tables = []
    for kind in kinds:
        names = {name for result in results.values() if result for name in result.groups.get(kind, {})}
        if is_idle(kind, len(names)):
            continue
        rows: dict[str, list[tuple[NamedRun, GroupMetrics]]] = {}
        for run in runs:
            result = results[run.number]
            if result:
                rows.setdefault(ALL, []).append((run, result.overall))
        for name in sort_groups(kind, names):
            for run in runs:
                result = results[run.number]
                if result and name in result.groups.get(kind, {}):
                    rows.setdefault(name, []).append((run, result.groups[kind][name]))
        tables.append(_loss_table(kind, rows))
    return tables


def _loss_table(kind: str, rows: dict[str, list[tuple[NamedRun, GroupMetrics]]]) -> RunTable:
    every = [metrics for scored in rows.values() for _, metrics in scored]
    ends = [end for m in every if m.interval for end in (m.interval.low, m.interval.high)]
    axis = linear_axis([m.loss for m in every] + ends)
    marked = [
        (
            name,
            [
                RunMark(
                    run,
                    axis.at(metrics.loss),
                    axis.at(metrics.interval.low) if metrics.interval else None,
                    axis.at(metrics.interval.high) if metrics.interval else None,
                    metrics.loss,
                )
                for run, metrics in scored
            ],
        )
        for name, scored in rows.items()
    ]
    return RunTable(kind, axis, marked)


def _divergence(runs: list[NamedRun]) -> RunTable | None:
    """Mean KL of every merge, with the span from median to 99 %."""
    divergences = [(run, run.records.behaviour.overall.kl) for run in runs if run.records.behaviour]
    if not divergences:
        return None
    axis = log_axis([value for _, kl in divergences for value in (kl.mean, kl.median, kl.q99)])
    marks = [
        RunMark(run, axis.at(kl.mean), axis.at(kl.median), axis.at(kl.q99), kl.mean)
        for run, kl in divergences
    ]
    return RunTable("run", axis, [(mark.run.name, [mark]) for mark in marks])


def differences(runs: list[NamedRun]) -> list[tuple[str, list[str]]]:
    """Settings, versions and inputs that are not the same in all runs: name → value in each."""
    flat = [
        {f"{title}: {name}": value for title, pairs in provenance(run.records) for name, value in pairs}
        for run in runs
    ]
    names = list(dict.fromkeys(name for entry in flat for name in entry))
    values = {name: [entry.get(name, "–") for entry in flat] for name in names}
    return [(name, shown) for name, shown in values.items() if len(set(shown)) > 1]


def _warnings(runs: list[NamedRun]) -> list[str]:
    """Why losses of these runs must not be held against each other."""
    warnings = []
    sets = {v.test_set.sha256 for run in runs for v in run.records.validations.values()}
    if len(sets) > 1:
        warnings.append("The runs were validated on different test sets: their losses cannot be compared.")
    settings = {
        v.settings.model_copy(update={"batch_tokens": 0, "device": ""}).model_dump_json()
        for run in runs
        for v in run.records.validations.values()
    }
    if len(settings) > 1:
        warnings.append("The runs were scored with different settings: see the differences below.")
    return warnings
