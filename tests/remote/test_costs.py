"""What runs cost, and a run that stops when its budget is spent."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorasmith.errors import BudgetError, InputError, UsageError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.deadline import OutOfTime, stop_after
from lorasmith.records.release import StageTiming, TimingRecord
from lorasmith.remote.costs import costs
from lorasmith.stages import RunFolder, Stage, open_run


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


def test_the_command(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", {"validate-base": 1200.0, "merge": 600.0})

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lorasmith.cli.main", "costs", str(run), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    shown = typed("--price-per-hour", "1.50", "--planned", "0.75", "--budget", "1")
    assert shown.returncode == 0, shown.stderr
    assert "Grand total" in shown.stdout and "0:30:00.0" in shown.stdout and "$0.75" in shown.stdout
    assert "Within budget: $0.75 of $1.00" in shown.stdout
    over = typed("--price-per-hour", "1.50", "--budget", "0.5", "--format", "json")
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
        run.budget = 0.5
        run.perform(a_stage(run, 0.05, "first"))
        with pytest.raises(BudgetError, match="is spent") as stopped:
            run.perform(a_stage(run, 30.0))
    assert stopped.value.exit_code == 1 and "larger --budget" in str(stopped.value)
    record = read_record(tmp_path / "timing.json", TimingRecord)
    assert record.unfinished_seconds >= 0.3
    assert costs([tmp_path]).dollars == pytest.approx(0.5, abs=0.2)
    with open_run(tmp_path, price_per_hour=price) as run:
        run.budget = 0.5
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
