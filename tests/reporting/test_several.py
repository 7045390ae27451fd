"""Several runs on one page: named, told apart, and not compared where they must not be."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.errors import UsageError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.records.merging import MergeRecord
from lorasmith.records.release import RunRecord
from lorasmith.reporting.several import write_comparison
from tests.reporting.test_page import Page
from tests.samples import SECRET, sample_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs that differ in rounding alone, the second without a merge's comparison."""
    one = sample_run(tmp_path / "nearest", count=30)
    two = sample_run(tmp_path / "dithered", count=30)
    merge = two / "merged" / "lorasmith_merge.json"
    record = read_record(merge, MergeRecord).model_copy(update={"rounding": "dithered"})
    write_record(merge, record)
    run = read_record(two / "run.json", RunRecord)
    write_record(two / "run.json", run.model_copy(update={"config": {**run.config, "rounding": "dithered"}}))
    return [one, two]


def _page(runs: list[Path]) -> Page:
    output = runs[0].parent / "several.html"
    write_comparison(runs, output)
    return Page(output.read_text())


def test_what_differs_is_listed_and_what_is_equal_is_not(runs: list[Path]) -> None:
    text = _page(runs).sections["differences"]
    assert "What was asked: rounding" in text
    assert "nearest" in text
    assert "dithered" in text
    assert "Versions: torch" not in text
    assert "seed" not in text


def test_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    runs = [sample_run(tmp_path / name / "run", count=10) for name in ("a", "b")]
    page = _page(runs)
    assert "Inputs, settings and versions are the same." in page.sections["differences"]
    assert "a/run" in page.sections["summary"]
    assert "b/run" in page.sections["summary"]
    assert "not comparable" not in page.sections["top"]


def test_other_test_sets_are_not_compared_in_silence(runs: list[Path], tmp_path: Path) -> None:
    other = sample_run(tmp_path / "other", count=25, seed=3)
    top = _page([*runs, other]).sections["top"]
    assert "different test sets" in top
    assert "lowest" not in top


def test_a_run_without_a_merge_still_has_its_row(runs: list[Path]) -> None:
    (runs[1] / "proof" / "behaviour.json").unlink()
    (runs[1] / "merged" / "lorasmith_merge.json").unlink()
    page = _page(runs)
    assert page.sections["summary"].count("dithered") == 1
    assert "dithered" not in page.sections["merges"]


def test_it_shows_no_text_of_rows_and_needs_two_runs(runs: list[Path]) -> None:
    _page(runs)
    assert SECRET not in (runs[0].parent / "several.html").read_text()
    with pytest.raises(UsageError, match="nothing to compare"):
        write_comparison(runs[:1], runs[0].parent / "x.html")
