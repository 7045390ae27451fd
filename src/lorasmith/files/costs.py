"""Dollars of runs, phase by phase, from what each run folder records; and of rented machines, whole.

A run on one's own machine costs wall time · price per hour. One on a rented machine costs what the rental
costs, from the offer to its end: the time of its stages, all other time (starting, installing, copying), and
traffic. The price of a rental has its disk in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lorasmith.errors import InputError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.records.release import CostRecord, PhaseCost, RentalCost, StageTiming, TimingRecord
from lorasmith.records.remote import Rental, RentalRecord

UNFINISHED = "unfinished attempts"
AROUND = "renting, installing, copying"
TRAFFIC = "traffic"
RENTALS = "rentals.json"
"""File of a run folder that lists the machines that were rented for it."""


def costs(
    runs: Sequence[Path],
    *,
    price_per_hour: float | None = None,
    planned: float | None = None,
    budget: float | None = None,
) -> CostRecord:
    """The cost of each phase of each run folder, and the grand total.

    `price_per_hour` in US dollars replaces what the runs recorded. Without any price the times stand alone.
    `planned` and `budget` replace what was estimated before renting, and what the runs or rentals were given.
    Raises `InputError` for a folder without `timing.json`, `UsageError` for a budget without a price.
    """
    for name, value in (("--price-per-hour", price_per_hour), ("--planned", planned), ("--budget", budget)):
        if value is not None and value < 0:
            raise UsageError(f"{name} {value:g} is below zero", expected=f"{name} 0 or more")
    timings = [_timing(run) for run in runs]
    rented = [_rentals(run, price_per_hour) for run in runs]
    phases = [
        phase
        for run, timing, rentals in zip(runs, timings, rented, strict=True)
        for phase in _phases(run, timing, rentals, price_per_hour)
    ]
    known = [phase.dollars for phase in phases if phase.dollars is not None]
    total = sum(known) if len(known) == len(phases) else None
    if budget is not None and total is None:
        raise UsageError("a budget needs the price of every run", expected="--price-per-hour, in US dollars")
    rentals = list({rental.label: rental for of_run in rented for rental in of_run}.values())
    if planned is None:
        planned = _all([rental.planned for rental in rentals])
    if budget is None:
        budget = _all([_budget(timing, of_run) for timing, of_run in zip(timings, rented, strict=True)])
    joules = [phase.joules for phase in phases if phase.joules is not None]
    return CostRecord(
        phases=phases,
        rentals=[rental_cost(rental) for rental in rentals],
        wall_seconds=round(sum(phase.wall_seconds for phase in phases), 3),
        joules=round(sum(joules), 3) if joules else None,
        dollars=total,
        planned=planned,
        budget=budget,
        within_budget=None if budget is None or total is None else total <= budget,
    )


def rental_cost(rental: Rental, now: float | None = None) -> RentalCost:
    """What a rented machine cost, or has cost until `now` (seconds since 1970; the present by default)."""
    until = rental.gone_at if rental.gone_at is not None else time.time() if now is None else now
    hours = max(0.0, until - rental.asked_at) / 3600 if rental.state != "refused" else 0.0
    disk = hours * rental.disk_per_hour
    # What the provider billed beyond our own count is part of the price, whatever it was for.
    compute = hours * rental.price_per_hour - disk + rental.billed_ahead
    traffic = traffic_dollars(rental)
    return RentalCost(
        label=rental.label,
        instance=rental.instance,
        hours=hours,
        compute=compute,
        disk=disk,
        traffic=traffic,
        dollars=compute + disk + traffic,
        planned=rental.planned,
    )


def traffic_dollars(rental: Rental) -> float:
    """US dollars for what the machine has sent and received; GB are 10⁹ bytes."""
    return (rental.sent_bytes * rental.upload_per_gb + rental.received_bytes * rental.download_per_gb) / 1e9


def _timing(run: Path) -> TimingRecord:
    path = run / "timing.json"
    if not path.is_file():
        raise InputError(
            "this is no run folder", where=run, expected="a folder with timing.json", remedy="check the path"
        )
    return read_record(path, TimingRecord)


def _rentals(run: Path, price: float | None) -> list[Rental]:
    path = run / RENTALS
    if not path.is_file():
        return []
    recorded = read_record(path, RentalRecord).rentals
    if price is None:
        return recorded
    return [rental.model_copy(update={"price_per_hour": price}) for rental in recorded]


def _phases(
    run: Path, timing: TimingRecord, rentals: Sequence[Rental], price: float | None
) -> list[PhaseCost]:
    name = run.resolve().name
    rate = timing.price_per_hour if price is None else price
    phases = [_stage(name, stage, rate) for stage in timing.stages]
    if timing.unfinished_seconds:
        phases.append(_time(name, UNFINISHED, timing.unfinished_seconds, rate))
    if not rentals:
        return phases
    whole = [rental_cost(rental) for rental in rentals]
    paid = sum(phase.dollars or 0.0 for phase in phases)
    rest = sum(rental.hours for rental in whole) * 3600 - sum(phase.wall_seconds for phase in phases)
    around = sum(rental.compute + rental.disk for rental in whole) - paid
    # Below zero where some of the stages did not run on these machines: that time is not theirs.
    around_cost = PhaseCost(
        run=name, phase=AROUND, wall_seconds=round(max(0.0, rest), 3), dollars=max(0.0, around)
    )
    traffic = PhaseCost(
        run=name, phase=TRAFFIC, wall_seconds=0.0, dollars=sum(rental.traffic for rental in whole)
    )
    return [*phases, around_cost, traffic]


def _stage(run: str, stage: StageTiming, rate: float | None) -> PhaseCost:
    return _time(run, stage.stage, stage.wall_seconds, rate).model_copy(
        update={
            "cpu_seconds": stage.cpu_seconds,
            "gpu_seconds": stage.gpu_seconds,
            "joules": stage.joules,
            "peak_rss_bytes": stage.peak_rss_bytes,
            "worker_peak_rss_bytes": stage.worker_peak_rss_bytes,
            "gpu_peak_bytes": stage.gpu_peak_bytes,
        }
    )


def _time(run: str, phase: str, seconds: float, rate: float | None) -> PhaseCost:
    dollars = None if rate is None else seconds / 3600 * rate
    return PhaseCost(run=run, phase=phase, wall_seconds=seconds, dollars=dollars)


def _budget(timing: TimingRecord, rentals: Sequence[Rental]) -> float | None:
    """What the run was given, else what its rentals were."""
    if timing.budget is not None:
        return timing.budget
    return sum(rental.max_cost for rental in rentals) if rentals else None


def _all(amounts: Sequence[float | None]) -> float | None:
    """Their sum, where all are known."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if known and len(known) == len(amounts) else None
