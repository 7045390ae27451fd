"""The commands of a release as a person types them: report, package, verify, unpack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasmith.cli.main import run as lorasmith
from lorasmith.errors import ExitCode
from tests.samples import sample_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run in the current folder."""
    monkeypatch.chdir(tmp_path)
    return sample_run(tmp_path / "run", count=10)


def test_the_whole_way_to_the_other_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lorasmith(["report", "run"]) == ExitCode.OK
    assert Path("run/report.html").is_file()
    assert lorasmith(["package", "run", "--output", "out", "--part-size", "20kB"]) == ExitCode.OK
    assert lorasmith(["verify", "out"]) == ExitCode.OK
    assert lorasmith(["unpack", "out", "--output", "there"]) == ExitCode.OK
    assert lorasmith(["verify", "there"]) == ExitCode.OK
    assert "everything is as it was written" in capsys.readouterr().out
    assert lorasmith(["report", "there/validation_results", "--output", "again.html"]) == ExitCode.OK
    assert lorasmith(["verify", "there/validation_results"]) == ExitCode.OK


def test_the_packaged_report_has_no_timings(run: Path) -> None:
    lorasmith(["package", "run", "--output", "out"])
    lorasmith(["unpack", "out/validation_results.tar.gz", "--output", "there"])
    page = Path("there/validation_results/report.html").read_text()
    assert 'id="provenance"' in page
    assert 'id="time"' not in page
    assert "ACME-9000" not in page


def test_damage_is_an_answer_not_a_crash(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lorasmith(["package", "run", "--output", "out"])
    archive = Path("out/merged_model.tar.gz")
    archive.write_bytes(archive.read_bytes()[:-7])
    capsys.readouterr()
    assert lorasmith(["verify", "out"]) == ExitCode.ANSWER_IS_NO
    assert "merged_model.tar.gz is cut short" in capsys.readouterr().out
    assert lorasmith(["verify", "out", "--json"]) == ExitCode.ANSWER_IS_NO
    assert json.loads(capsys.readouterr().out)[0]["code"] == "damaged"
    assert lorasmith(["unpack", "out", "--output", "there"]) == ExitCode.ANSWER_IS_NO
    assert "go on fetching it" in capsys.readouterr().err
    assert not Path("there").exists()


def test_hidden_rows_are_checked_against_an_own_copy(run: Path) -> None:
    lorasmith(["package", "run", "--output", "out"])
    lorasmith(["unpack", "out/validation_results.tar.gz", "--output", "there"])
    own = "run/testset/test_set.jsonl"
    assert lorasmith(["verify", "there", "--rows", own, "--rejoined", "whole.jsonl"]) == ExitCode.OK
    assert Path("whole.jsonl").read_bytes() == Path(own).read_bytes()
    rows = Path(own).read_text().replace("quintessential", "commonplace")
    Path("other.jsonl").write_text(rows)
    assert lorasmith(["verify", "there", "--rows", "other.jsonl"]) == ExitCode.ANSWER_IS_NO


def test_several_runs_make_one_page(run: Path) -> None:
    sample_run(Path("other"), count=10, seed=1)
    assert lorasmith(["report", "run", "other"]) == ExitCode.OK
    assert "2 runs compared" in Path("comparison.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["verify", "nowhere"], "no such folder"),
        (["package", "run", "--compression", "rar"], "--compression is 'rar'"),
        (["package", "run", "--part-size", "many"], "no size of a part"),
        (["report", "nowhere"], "no record of a run"),
        (["unpack", "run/run.json", "--output", "x"], "manifest.json is missing"),
    ],
)
def test_mistakes_get_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert lorasmith(arguments) == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
