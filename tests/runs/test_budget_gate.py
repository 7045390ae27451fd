"""`--budget` as a gate: judged with the other gates on cost, and no part of what money must not change."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.files.atomic import read_record, write_record
from lorasmith.options import RunOptions
from lorasmith.progress import Unwatched
from lorasmith.records.release import GateRecord, TimingRecord
from lorasmith.runs.config import resolved_gates
from lorasmith.runs.step import RunContext
from lorasmith.runs.steps import judge_costs
from tests.samples import sample_run


def judged(run: Path, budget: float | None) -> GateRecord | None:
    places = {"base": run, "adapter": run, "test_set": run / "testset" / "test_set.jsonl", "output": run}
    config = RunOptions.make({**places, "price_per_hour": 1.5, "budget": budget})
    judge_costs(RunContext(config), Unwatched())
    assert all(gate.name != "--budget" for gate in resolved_gates(config))
    path = run / "cost_gates.json"
    return read_record(path, GateRecord) if path.is_file() else None


def test_the_budget_is_a_gate_on_all_that_was_paid_for(tmp_path: Path) -> None:
    run = sample_run(tmp_path / "run", count=5)
    timing = read_record(run / "timing.json", TimingRecord)
    priced = timing.model_copy(update={"price_per_hour": 1.5})
    write_record(run / "timing.json", priced)
    # 168.7 seconds at $1.50 an hour are 7.03 cents.
    within = judged(run, 0.08)
    assert within and within.passed and within.gates[0].gate.name == "--budget"
    over = judged(run, 0.07)
    assert over and not over.passed
    # So are attempts that came to no end.
    write_record(run / "timing.json", priced.model_copy(update={"unfinished_seconds": 60.0}))
    lost = judged(run, 0.08)
    assert lost and not lost.passed and lost.gates[0].measured == pytest.approx(1.5 * (168.7 + 60) / 3600)
    assert judged(run, None) is None
