"""Time, energy and money of a run on its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.files.atomic import read_record, write_record
from lorasmith.records.release import TimingRecord
from lorasmith.records.remote import RentalRecord
from lorasmith.reporting.page import write_report
from tests.files.test_costs import a_rental
from tests.samples import sample_run


def section(run: Path) -> str:
    write_report(run, run / "report.html")
    page = (run / "report.html").read_text()
    return page[page.index('<section id="time">') : page.index('<section id="provenance">')]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return sample_run(tmp_path / "run", count=5)


def test_a_run_without_price_and_counters(run: Path) -> None:
    found = section(run)
    assert "validate-base" in found and "processor" in found and "not measured" in found
    assert "$" not in found and "budget" not in found


def test_a_rented_run_with_a_gpu(run: Path) -> None:
    record = read_record(run / "timing.json", TimingRecord)
    busy = {"gpu_seconds": 40.0, "gpu_joules": 7200.0, "gpu_peak_bytes": 17 * 10**9}
    busy["worker_peak_rss_bytes"] = 5 * 10**9
    stages = [stage.model_copy(update=busy) for stage in record.stages]
    write_record(run / "timing.json", record.model_copy(update={"stages": stages, "price_per_hour": 1.5}))
    write_record(run / "rentals.json", RentalRecord(rentals=[a_rental(max_cost=2.0)]))
    found = section(run)
    assert "GPU busy" in found and "2 Wh" in found and "GPU 17.0 GB" in found
    assert "worker 5.0 GB" in found
    assert "renting, installing, copying" in found and "traffic $0.08" in found
    assert "Planned $2.75, actual $3.08." in found
    assert '<span class="badge bad">over budget</span> $3.08 of $2.00' in found
