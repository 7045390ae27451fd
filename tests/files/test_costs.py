"""What runs cost, and a run that stops when its budget is spent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import BudgetError, InputError, UsageError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.costs import costs, rental_cost
from lorasmith.machine.resources import OutOfTime, stop_after
from lorasmith.records.release import StageTiming, TimingRecord
from lorasmith.records.remote import Rental, RentalRecord
from lorasmith.runs.stages import RunFolder, Stage, open_run


def a_run(folder: Path, seconds: dict[str, float], *, price: float | None = None, lost: float = 0.0) -> Path:
    stages = [
        StageTiming(stage=name, wall_seconds=wall, cpu_seconds=wall, peak_rss_bytes=10**9, started="x")
        for name, wall in seconds.items()
    ]
    record = TimingRecord(hardware={}, price_per_hour=price, unfinished_seconds=lost, stages=stages)
    write_record(folder / "timing.json", record)
    return folder


def test_phases_and_grand_total(tmp_path: Path) -> None:
    one = a_run(tmp_path / "one", {"validate": 900.0, "merge": 300.0}, price=1.5, lost=600.0)
    two = a_run(tmp_path / "two", {"validate": 3600.0}, price=3.0)
    found = costs([one, two], planned=4.0, budget=4.0)
    assert [(phase.run, phase.phase, phase.dollars) for phase in found.phases] == [
        ("one", "validate", pytest.approx(0.375)),
        ("one", "merge", pytest.approx(0.125)),
        ("one", "unfinished attempts", pytest.approx(0.25)),
        ("two", "validate", pytest.approx(3.0)),
    ]
    assert found.dollars == pytest.approx(3.75) and found.within_budget is True
    assert costs([one, two], price_per_hour=6.0, budget=9.0).dollars == pytest.approx(9.0)
    assert costs([one, two], price_per_hour=6.0, budget=8.99).within_budget is False


def test_without_a_price_times_stand_alone(tmp_path: Path) -> None:
    priced = a_run(tmp_path / "priced", {"a": 60.0}, price=1.0)
    free = a_run(tmp_path / "free", {"a": 60.0})
    found = costs([priced, free])
    assert found.dollars is None and found.wall_seconds == 120.0
    with pytest.raises(UsageError, match="price of every run"):
        costs([priced, free], budget=1.0)
    with pytest.raises(UsageError, match="below zero"):
        costs([priced], price_per_hour=-1.0)
    with pytest.raises(InputError, match="no run folder"):
        costs([tmp_path])


def a_rental(**changes: Any) -> Rental:
    """Two hours at $1.50, three cents of it an hour for the disk; 20 GB there, 30 GB back."""
    settings: dict[str, Any] = {
        "label": "lorasmith-1",
        "provider": "vast.ai",
        "state": "gone",
        "instance": 5,
        "price_per_hour": 1.5,
        "disk_per_hour": 0.03,
        "upload_per_gb": 0.002,
        "download_per_gb": 0.001,
        "planned": 2.75,
        "max_price": 2.0,
        "max_cost": 4.0,
        "max_hours": 6.0,
        "asked_at": 1000.0,
        "gone_at": 8200.0,
        "sent_bytes": 30 * 10**9,
        "received_bytes": 20 * 10**9,
    }
    return Rental(**{**settings, **changes})


def test_a_rented_run_costs_what_the_rental_costs(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", {"validate": 1800.0, "merge": 900.0}, price=1.5)
    write_record(run / "rentals.json", RentalRecord(rentals=[a_rental()]))
    found = costs([run])
    # Two hours: 0.75 in stages, 1.25 around them. 30 GB · $0.002 from it, 20 GB · $0.001 to it.
    assert {phase.phase: phase.dollars for phase in found.phases} == {
        "validate": pytest.approx(0.75),
        "merge": pytest.approx(0.375),
        "renting, installing, copying": pytest.approx(1.875),
        "traffic": pytest.approx(0.08),
    }
    assert found.dollars == pytest.approx(3.08) and found.wall_seconds == 7200.0
    (rental,) = found.rentals
    assert (rental.compute, rental.disk, rental.traffic) == (
        pytest.approx(2.94),
        pytest.approx(0.06),
        pytest.approx(0.08),
    )
    assert (found.planned, found.budget, found.within_budget) == (2.75, 4.0, True)
    assert costs([run], budget=3.0).within_budget is False
    # A first machine that was lost counts as well; at a price of one's own, both have it.
    first = a_rental(label="lorasmith-0", asked_at=0.0, gone_at=3600.0, sent_bytes=0, received_bytes=0)
    write_record(run / "rentals.json", RentalRecord(rentals=[first, a_rental()]))
    assert costs([run]).dollars == pytest.approx(4.58)
    assert costs([run]).within_budget is True and costs([run]).budget == 8.0
    assert costs([run], price_per_hour=1.0).dollars == pytest.approx(3.08)


def test_a_rental_that_still_runs_has_cost_something_and_a_refused_one_nothing() -> None:
    running = a_rental(state="rented", gone_at=None, sent_bytes=0, received_bytes=0)
    assert rental_cost(running, now=4600.0).dollars == pytest.approx(1.5)
    assert rental_cost(a_rental(state="refused", sent_bytes=0, received_bytes=0)).dollars == 0.0


def test_a_run_remembers_its_budget(tmp_path: Path) -> None:
    with open_run(tmp_path, price_per_hour=1.0) as run:
        run.budget = 0.5
        run.perform(a_stage(run, 0.01))
    found = costs([tmp_path])
    assert (found.budget, found.within_budget) == (0.5, True)
    assert costs([tmp_path], price_per_hour=1e9).within_budget is False


def test_what_devices_tell_is_summed_and_what_they_do_not_is_said(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", {"validate": 60.0, "merge": 30.0})
    record = read_record(run / "timing.json", TimingRecord)
    measured = {"gpu_seconds": 45.0, "gpu_joules": 18000.0, "cpu_joules": 3600.0, "gpu_peak_bytes": 10**10}
    stages = [record.stages[0].model_copy(update=measured), record.stages[1]]
    write_record(run / "timing.json", record.model_copy(update={"stages": stages}))
    found = costs([run])
    assert [phase.device_seconds for phase in found.phases] == [45.0, 30.0]
    assert [phase.joules for phase in found.phases] == [21600.0, None] and found.joules == 21600.0
    shown = typed("costs", str(run))
    assert re.search(r"validate +0:01:00.0 +0:00:45.0 +6.00 Wh +1.0 GB, GPU 10.0 GB", shown.stdout)
    assert re.search(r"merge +0:00:30.0 +0:00:30.0 +not measured +1.0 GB", shown.stdout)


def typed(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorasmith.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", {"validate-base": 1200.0, "merge": 600.0})
    shown = typed("costs", str(run), "--price-per-hour", "1.50", "--planned", "0.75", "--budget", "1")
    assert shown.returncode == 0, shown.stderr
    assert "Grand total" in shown.stdout and "0:30:00.0" in shown.stdout and "$0.75" in shown.stdout
    assert "Within budget: $0.75 of $1.00" in shown.stdout
    over = typed("costs", str(run), "--price-per-hour", "1.50", "--budget", "0.5", "--format", "json")
    assert over.returncode == 1
    assert json.loads(over.stdout)["within_budget"] is False


def a_stage(run: RunFolder, seconds: float, name: str = "work") -> Stage:
    def action() -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                time.sleep(0.01)
            except Exception:  # code that takes every error for its own must not swallow the end
                continue
        (run.path / f"{name}.txt").write_text("done")

    return Stage(name, {}, {}, [f"{name}.txt"], action)


def test_a_run_stops_at_its_budget_and_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    price = 3600.0  # a dollar a second
    with open_run(tmp_path, price_per_hour=price) as run:
        run.budget = 2.0
        run.perform(a_stage(run, 0.05, "first"))
        with pytest.raises(BudgetError, match="is spent") as stopped:
            run.perform(a_stage(run, 30.0))
    assert stopped.value.exit_code == 1 and "larger --budget" in str(stopped.value)
    record = read_record(tmp_path / "timing.json", TimingRecord)
    assert record.unfinished_seconds > 0
    spent = costs([tmp_path]).dollars
    assert spent is not None and 1.9 < spent < 20
    with open_run(tmp_path, price_per_hour=price) as run:
        run.budget = 2.0
        assert run.perform(a_stage(run, 0.05, "first")).reused  # what is done costs nothing
        with pytest.raises(BudgetError):
            run.perform(a_stage(run, 0.01))
    with open_run(tmp_path, price_per_hour=price) as run:
        run.budget = 60.0
        run.perform(a_stage(run, 0.01))
    assert (tmp_path / "work.txt").read_text() == "done"


def test_an_attempt_that_fails_is_paid_for(tmp_path: Path) -> None:
    def fail() -> None:
        time.sleep(0.2)
        raise InputError("no")

    with open_run(tmp_path, price_per_hour=3600.0) as run, pytest.raises(InputError):
        run.perform(Stage("bad", {}, {}, [], fail))
    assert costs([tmp_path]).phases[0].wall_seconds >= 0.2


def test_the_alarm_is_taken_back() -> None:
    with stop_after(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(OutOfTime), stop_after(0.05):
        time.sleep(5)
    with pytest.raises(OutOfTime), stop_after(0.0):
        raise AssertionError("no time is left")
    ended: list[str] = []
    thread = threading.Thread(target=lambda: _in_thread(ended))
    thread.start()
    thread.join()
    assert ended == ["to its end"]


def _in_thread(ended: list[str]) -> None:
    with stop_after(0.01):
        time.sleep(0.05)
    ended.append("to its end")
