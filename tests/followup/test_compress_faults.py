"""Compression that fails, is killed, or must not begin: nothing half-done stays, nothing of others goes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lorasmith.errors import BusyError, CheckpointError, DiskError, MachineError, UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.files.output_folder import only_one
from lorasmith.followup.compression import quantize
from lorasmith.followup.compression.compress import compress
from tests.faults import in_child, was_killed
from tests.followup.compressing import copies


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise ModuleNotFoundError(\"No module named 'auto_round'\")", "not installed"),
        ("raise ValueError('no such layer')", "ValueError: no such layer"),
        ("import os; os.kill(os.getpid(), 9)", "killed or ran out of memory"),
    ],
)
def test_a_worker_that_fails_leaves_nothing(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(quantize, "WORKER", ("-c", script))
    with pytest.raises(MachineError, match=said):
        compress(compressed / "base", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_killed_at_any_point_the_output_is_whole_or_absent(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "WORKER", copies(compressed))

    def work() -> None:
        compress(compressed / "base", tmp_path / "out")

    assert in_child(work, die_at=None, count_to=tmp_path / "count") == 0
    whole = digest_folder(tmp_path / "out")
    writes = int((tmp_path / "count").read_text())
    for at in (2, writes // 2, writes - 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert was_killed(in_child(work, die_at=at))
        assert not (tmp_path / "out").exists() or digest_folder(tmp_path / "out") == whole
        work()
        assert digest_folder(tmp_path / "out") == whole
        assert not list(tmp_path.glob(".*partial"))


def test_a_result_that_does_not_load_is_not_published(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that says it is done, but left a cut file."""
    script = (
        "import json, sys, pathlib, shutil; job = json.load(open(sys.argv[1]));"
        f"out = shutil.copytree({str(compressed / 'int4')!r}, job['output'] + '/m');"
        "f = pathlib.Path(out) / 'model.safetensors'; f.write_bytes(f.read_bytes()[:-100])"
    )
    monkeypatch.setattr(quantize, "WORKER", ("-c", script))
    with pytest.raises(CheckpointError, match="does not load"):
        compress(compressed / "base", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_compressions_of_one_output_are_refused(compressed: Path, tmp_path: Path) -> None:
    with only_one(tmp_path / "out", "compression"), pytest.raises(BusyError, match="another compression"):
        compress(compressed / "base", tmp_path / "out")


def test_a_folder_of_somebody_else_is_not_replaced(compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="did not write"):
        compress(compressed / "base", tmp_path / "mine")
    with pytest.raises(UsageError, match="lies in or holds the input"):
        compress(compressed / "base", compressed / "base")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_no_disk(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = os.statvfs(tmp_path)
    full = os.statvfs_result((state.f_bsize, state.f_frsize, state.f_blocks, 0, 0, *tuple(state)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(DiskError, match="too little disk space to compress"):
        compress(compressed / "base", tmp_path / "out")
