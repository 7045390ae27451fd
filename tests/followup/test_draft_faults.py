"""A draft's training that is killed, stopped or must not begin."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import BusyError, CheckpointError, DiskError, UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.files.output_folder import only_one
from lorasmith.followup.drafts import trainer
from lorasmith.followup.drafts.draft import train_draft
from tests.faults import in_child, was_killed
from tests.followup.drafting import SETTINGS


def train(drafted: Path, output: Path) -> None:
    train_draft(drafted / "target", drafted / "responses.jsonl", output, layers=[0, 3], options=SETTINGS)


def test_a_killed_training_goes_on_to_the_same_bytes(drafted: Path, tmp_path: Path) -> None:
    work = partial(train, drafted, tmp_path / "draft")
    counted = tmp_path / "count"
    assert in_child(work, die_at=None, count_to=counted) == 0
    whole = digest_folder(tmp_path / "draft")
    assert whole == digest_folder(drafted / "draft")
    writes = int(counted.read_text())
    for at in (writes // 4, writes // 2):  # within a checkpoint's files, and between two of them
        (tmp_path / "draft").rename(tmp_path / f"before-{at}")
        assert was_killed(in_child(work, die_at=at))
        assert not (tmp_path / "draft").exists()
        assert (tmp_path / ".draft.checkpoint" / "state.json").is_file()
        work()
        assert digest_folder(tmp_path / "draft") == whole
        assert not (tmp_path / ".draft.checkpoint").exists()


def test_a_checkpoint_of_other_settings_is_not_continued(
    drafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.followup.drafts.draft.save_draft", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_draft(
            drafted / "target", drafted / "responses.jsonl", tmp_path / "d", layers=[0], options=SETTINGS
        )
    other = SETTINGS.model_copy(update={"seed": 7})
    with pytest.raises(UsageError, match="other inputs, settings or versions"):
        train_draft(
            drafted / "target", drafted / "responses.jsonl", tmp_path / "d", layers=[0], options=other
        )


def test_a_damaged_checkpoint_is_named(
    drafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that lost part of a file: no traceback, and no training from half of it."""
    with monkeypatch.context() as patched:
        patched.setattr("lorasmith.followup.drafts.draft.save_draft", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_draft(
                drafted / "target", drafted / "responses.jsonl", tmp_path / "d", layers=[0], options=SETTINGS
            )
    for name in ("state.json", "model.safetensors", "optimizer.pt"):
        file = tmp_path / ".d.checkpoint" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match="damaged") as caught:
            train_draft(
                drafted / "target", drafted / "responses.jsonl", tmp_path / "d", layers=[0], options=SETTINGS
            )
        assert ".d.checkpoint" in str(caught.value)
        file.write_bytes(content)


def test_a_disk_that_fills_up_in_a_checkpoint_loses_nothing(
    drafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint meets a full disk; the first is then continued to the same bytes."""
    real, calls = trainer.save_file, []

    def save(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # a checkpoint holds two such files
            raise OSError(28, "No space left on device")
        real(*arguments)

    work = partial(train, drafted, tmp_path / "draft")
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "save_file", save)
        with pytest.raises(DiskError, match="the disk is full"):
            work()
    assert json.loads((tmp_path / ".draft.checkpoint" / "state.json").read_text())["step"] == 6
    work()
    assert digest_folder(tmp_path / "draft") == digest_folder(drafted / "draft")


def test_two_trainings_of_one_output_are_refused(drafted: Path, tmp_path: Path) -> None:
    with only_one(tmp_path / "d", "training"), pytest.raises(BusyError, match="another training"):
        train_draft(
            drafted / "target", drafted / "responses.jsonl", tmp_path / "d", layers=[0], options=SETTINGS
        )


def test_a_loss_that_is_no_number_stops_it(
    drafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.batch_loss
    monkeypatch.setattr(trainer, "batch_loss", lambda *a, **k: real(*a, **k) * float("nan"))
    with pytest.raises(trainer.MachineError, match="step 1 is not a number"):
        train_draft(
            drafted / "target", drafted / "responses.jsonl", tmp_path / "d", layers=[0], options=SETTINGS
        )


def test_no_disk(drafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = os.statvfs(tmp_path)
    full = os.statvfs_result((state.f_bsize, state.f_frsize, state.f_blocks, 0, 0, *tuple(state)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(DiskError, match="too little disk space to train the draft"):
        train_draft(
            drafted / "target", drafted / "responses.jsonl", tmp_path / "d", layers=[0], options=SETTINGS
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0.0},
        {"patience": 0},
        {"kl_weight": -1.0},
        {"validation": 0.6, "held_out": 0.5},
        {"labels": "x"},
        {"cross_entropy_weight": 0.0, "kl_weight": 0.0},
    ],
)
def test_wrong_settings_are_one_message(drafted: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        train_draft(
            drafted / "target",
            drafted / "responses.jsonl",
            tmp_path / "d",
            layers=[0],
            **{**SETTINGS.values(), **wrong},
        )
    assert list(tmp_path.iterdir()) == []
