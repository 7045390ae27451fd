"""A stage is done again exactly when an input, a parameter, its code or an output changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import BusyError, InputError
from lorasmith.records.release import StageTiming
from lorasmith.runs.stages import RunFolder, Stage, open_run, read_timings


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "input.txt"
    file.write_text("one")
    return file


def perform(run: RunFolder, source: Path, log: list[str], **changes: Any) -> StageTiming:
    """A stage that copies its input, and notes in `log` that it really ran."""

    def action() -> None:
        log.append("ran")
        (run.path / "copy.txt").write_text(source.read_text())

    settings: dict[str, Any] = {"parameters": {"k": 1}, "outputs": ["copy.txt"], "revision": 1, **changes}
    return run.perform(Stage("copy", {"input": source}, action=action, **settings))


def test_an_unchanged_stage_is_reused(tmp_path: Path, source: Path) -> None:
    log: list[str] = []
    with open_run(tmp_path / "run") as run:
        assert not perform(run, source, log).reused
        assert perform(run, source, log).reused
    assert log == ["ran"]


def change_input(run: RunFolder, source: Path) -> dict[str, Any]:
    source.write_text("two")
    return {}


def change_output(run: RunFolder, source: Path) -> dict[str, Any]:
    (run.path / "copy.txt").write_text("damaged")
    return {}


def remove_output(run: RunFolder, source: Path) -> dict[str, Any]:
    (run.path / "copy.txt").unlink()
    return {}


def damage_record(run: RunFolder, source: Path) -> dict[str, Any]:
    path = run.record_path("copy")
    path.write_text(path.read_text()[:-20])
    return {}


def other_version(run: RunFolder, source: Path) -> dict[str, Any]:
    path = run.record_path("copy")
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "version": "0.0.1/1"}))
    return {}


@pytest.mark.parametrize(
    "change",
    [
        change_input,
        change_output,
        remove_output,
        damage_record,
        other_version,
        lambda run, source: {"parameters": {"k": 2}},
        lambda run, source: {"revision": 2},
    ],
    ids=["input", "output", "no output", "damaged record", "version", "parameter", "revision"],
)
def test_a_changed_stage_is_done_again(tmp_path: Path, source: Path, change: Any) -> None:
    log: list[str] = []
    with open_run(tmp_path / "run") as run:
        perform(run, source, log)
    with open_run(tmp_path / "run") as run:
        changes = change(run, source)
        assert not perform(run, source, log, **changes).reused
        assert (run.path / "copy.txt").read_text() == source.read_text()
    assert log == ["ran", "ran"]


def test_a_stage_that_fails_leaves_no_record(tmp_path: Path, source: Path) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    log: list[str] = []
    with open_run(tmp_path / "run") as run:
        perform(run, source, log)
        with pytest.raises(RuntimeError, match="broken"):
            run.perform(Stage("copy", {"input": source}, {"k": 2}, ["copy.txt"], fail))
        assert not run.record_path("copy").exists()
        assert not perform(run, source, log).reused


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run, pytest.raises(InputError, match=r"absent\.txt"):
        run.perform(Stage("copy", {"input": tmp_path / "absent.txt"}, {}, [], lambda: None))


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "run"),
        pytest.raises(BusyError, match="another process"),
        open_run(tmp_path / "run"),
    ):
        pass
    with open_run(tmp_path / "run"):
        pass


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    with open_run(tmp_path / "run"):
        pass
    folder = tmp_path / "run" / "validation"
    (folder / ".merged.partial").mkdir(parents=True)
    leftover, kept = folder / ".base.json.123.partial", folder / ".merged.partial" / "shard"
    leftover.write_text("half")
    kept.write_text("resumable")
    with open_run(tmp_path / "run"):
        assert not leftover.exists()
        assert kept.exists()


def test_timings_are_kept_when_a_stage_is_reused(tmp_path: Path, source: Path) -> None:
    log: list[str] = []
    with open_run(tmp_path / "run") as run:
        first = perform(run, source, log)
    with open_run(tmp_path / "run") as run:
        second = perform(run, source, log)
    assert second == first.model_copy(update={"reused": True})
    assert read_timings(tmp_path / "run")["copy"] == second


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(Exception, match="run folder") as raised, open_run(tmp_path / "run"):
        pass
    assert str(tmp_path / "run") in str(raised.value)
