"""Dollars of runs: wall time · price per hour, phase by phase, from what each run recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasmith.errors import InputError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.records.costs import CostRecord, PhaseCost
from lorasmith.records.release import TimingRecord

UNFINISHED = "unfinished attempts"


def costs(
    runs: Sequence[Path],
    *,
    price_per_hour: float | None = None,
    planned: float | None = None,
    budget: float | None = None,
) -> CostRecord:
    """The cost of each phase of each run folder, and the grand total.

    `price_per_hour` in US dollars replaces what the runs recorded. Without any price the times stand alone.
    Raises `InputError` for a folder without `timing.json`, `UsageError` for a budget without a price.
    """
    for name, value in (("--price-per-hour", price_per_hour), ("--planned", planned), ("--budget", budget)):
        if value is not None and value < 0:
            raise UsageError(f"{name} {value:g} is below zero", expected=f"{name} 0 or more")
    phases = [phase for run in runs for phase in _phases(run, price_per_hour)]
    known = [phase.dollars for phase in phases if phase.dollars is not None]
    total = sum(known) if len(known) == len(phases) else None
    if budget is not None and total is None:
        raise UsageError("a budget needs the price of every run", expected="--price-per-hour, in US dollars")
    return CostRecord(
        phases=phases,
        wall_seconds=round(sum(phase.wall_seconds for phase in phases), 3),
        dollars=total,
        planned=planned,
        budget=budget,
        within_budget=None if budget is None or total is None else total <= budget,
    )


def _phases(run: Path, price: float | None) -> list[PhaseCost]:
    path = run / "timing.json"
    if not path.is_file():
        raise InputError(
            "this is no run folder", where=run, expected="a folder with timing.json", remedy="check the path"
        )
    record = read_record(path, TimingRecord)
    rate = record.price_per_hour if price is None else price
    found = [
        PhaseCost(
            run=run.resolve().name,
            phase=stage.stage,
            wall_seconds=stage.wall_seconds,
            cpu_seconds=stage.cpu_seconds,
            peak_rss_bytes=stage.peak_rss_bytes,
            dollars=_dollars(stage.wall_seconds, rate),
        )
        for stage in record.stages
    ]
    if record.unfinished_seconds:
        found.append(
            PhaseCost(
                run=run.resolve().name,
                phase=UNFINISHED,
                wall_seconds=record.unfinished_seconds,
                cpu_seconds=None,
                peak_rss_bytes=None,
                dollars=_dollars(record.unfinished_seconds, rate),
            )
        )
    return found


def _dollars(seconds: float, price: float | None) -> float | None:
    return None if price is None else seconds / 3600 * price
