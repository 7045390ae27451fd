"""An extraction that is killed, broken off or must not begin: no row is lost, repeated or mixed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from lorasmith.errors import BusyError, DiskError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.followup.responses.output import ResponseJournal
from lorasmith.followup.responses.respond import respond
from lorasmith.options import RespondOptions
from lorasmith.records.followup import RespondRecord
from tests.followup.responding import COUNT, Hears, Scripted, kill_after, read, scripted
from tests.tiny import tiny_rows


def test_a_killed_extraction_goes_on_and_ends_with_the_same_bytes(answering: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 4, "top_logprobs": 2}
    options = RespondOptions(**chosen)
    kill_after(answering, tmp_path / "r.jsonl", 5, **chosen)
    assert [path.name for path in tmp_path.iterdir()] == [".r.jsonl.journal"]
    with (tmp_path / ".r.jsonl.journal").open("ab") as journal:
        journal.write(b'{"row": {"key": "torn')  # as a power cut leaves it
    told: list[str] = []
    watcher = Hears(lambda finding: told.append(finding.message))
    respond(
        answering / "base", answering / "data.jsonl", tmp_path / "r.jsonl", options=options, watcher=watcher
    )
    assert (watcher.bars, told[0]) == ([COUNT - 5], f"5 of {COUNT} rows were answered before")
    (tmp_path / "whole").mkdir()
    respond(answering / "base", answering / "data.jsonl", tmp_path / "whole" / "r.jsonl", options=options)
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "whole" / "r.jsonl").read_bytes()
    resumed, whole = (
        read_record(folder / "r.json", RespondRecord) for folder in (tmp_path, tmp_path / "whole")
    )
    assert resumed.model_copy(update={"logprobs": whole.logprobs}) == whole
    one, other = (pq.read_table(folder / "r.logprobs.parquet") for folder in (tmp_path, tmp_path / "whole"))
    for name in ("key", "id", "finish_reason", "prompt", "tokens", "top_tokens"):
        assert one[name].to_pylist() == other[name].to_pylist()
    for left, right in zip(one["logprobs"].to_pylist(), other["logprobs"].to_pylist(), strict=True):
        assert left == pytest.approx(right, abs=1e-4)  # other neighbours, another order of summation


@pytest.mark.parametrize("after", [0, 1, 7, COUNT - 1])
def test_broken_off_at_any_row_none_is_lost_and_none_asked_twice(
    answering: Path, tmp_path: Path, after: int
) -> None:
    first, second = Scripted(break_after=after), Scripted()
    with pytest.raises(RuntimeError, match="broken off"):
        scripted(answering, tmp_path, first)
    scripted(answering, tmp_path, second)
    assert sorted(first.asked[:after] + second.asked) == list(range(COUNT))
    assert len(read(tmp_path / "r.jsonl")) == COUNT


@pytest.mark.parametrize("begun", [False, True], ids=["finished", "begun"])
def test_settings_are_not_mixed_in_one_output(answering: Path, tmp_path: Path, begun: bool) -> None:
    engine = Scripted(break_after=3) if begun else Scripted()
    if begun:
        with pytest.raises(RuntimeError):
            scripted(answering, tmp_path, engine)
    else:
        scripted(answering, tmp_path, engine)
    with pytest.raises(UsageError, match="max_new_tokens was 12, now 13") as raised:
        scripted(answering, tmp_path, Scripted(), max_new_tokens=13)
    assert "--output" in str(raised.value)
    with pytest.raises(UsageError, match="temperature"):
        scripted(answering, tmp_path, Scripted(), temperature=0.5)


def test_a_foreign_or_changed_output_is_left_alone(answering: Path, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match="no set of responses that lorasmith has written"):
        scripted(answering, tmp_path, Scripted())
    assert (tmp_path / "r.jsonl").read_text() == "mine\n"
    (tmp_path / "r.jsonl").unlink()
    scripted(answering, tmp_path, Scripted())
    with (tmp_path / "r.jsonl").open("a") as output:
        output.write('{"key": "x"}\n')
    with pytest.raises(UsageError, match="changed"):
        scripted(answering, tmp_path, Scripted())


def test_two_processes_do_not_write_one_output(answering: Path, tmp_path: Path) -> None:
    with ResponseJournal(tmp_path / ".r.jsonl.journal", {}), pytest.raises(BusyError):
        ResponseJournal(tmp_path / ".r.jsonl.journal", {})


def test_a_full_disk_loses_no_finished_row(answering: Path, tmp_path: Path) -> None:
    first, second = Scripted(), Scripted()
    write, written = os.write, []

    def full(file: int, content: bytes) -> int:
        written.append(file)
        if len(written) == 6:  # the head and four rows found room, of the fifth a part
            return write(file, content[:20])
        if len(written) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content)

    with patch("lorasmith.files.journal.os.write", full), pytest.raises(DiskError, match="disk is full"):
        scripted(answering, tmp_path, first)
    assert (tmp_path / ".r.jsonl.journal").read_bytes().endswith(b"}\n\n")  # no torn row hides the next ones
    scripted(answering, tmp_path, second)
    assert sorted(first.asked[:4] + second.asked) == list(range(COUNT))


def test_failed_rows_lie_aside_and_are_tried_again_when_asked(answering: Path, tmp_path: Path) -> None:
    record = scripted(answering, tmp_path, Scripted(fails=(2, 5)))
    assert (record.rows, record.failed) == (COUNT - 2, 2)
    aside = read(tmp_path / "r.failed.jsonl")
    assert [(row["id"], row["error"]) for row in aside] == [
        ("row-2", "the device gave up"),
        ("row-5", "the device gave up"),
    ]
    patient = Scripted()
    assert scripted(answering, tmp_path, patient).failed == 2
    assert patient.asked == []
    record = scripted(answering, tmp_path, patient, retry_failed=True)
    assert (sorted(patient.asked), record.failed, record.rows) == ([2, 5], 0, COUNT)
    assert not (tmp_path / "r.failed.jsonl").exists()
    assert [row["id"] for row in read(tmp_path / "r.jsonl")] == [row["id"] for row in tiny_rows(COUNT)]


def test_wrong_options_are_refused(answering: Path, tmp_path: Path) -> None:
    for options in (
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0.5},
        {"engine": "llama.cpp"},
        {"batch_size": 0},
        {"dtype": "int3"},
    ):
        with pytest.raises(UsageError):
            respond(
                answering / "base",
                answering / "data.jsonl",
                tmp_path / "r.jsonl",
                **options,
            )
    assert list(tmp_path.iterdir()) == []
