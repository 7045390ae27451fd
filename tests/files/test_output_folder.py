"""An output replaces what lorasmith has left there, and nothing of anybody else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.benchmarks.fetch import fetch
from lorasmith.errors import LorasmithError, UsageError
from lorasmith.files.atomic import write_bytes
from lorasmith.files.journal import JournalFile
from lorasmith.files.jsonl import write_examples
from lorasmith.files.output_folder import require_own_place, require_own_record
from lorasmith.followup.compression.compress import compress
from lorasmith.followup.drafts.draft import train_draft
from lorasmith.followup.responses.respond import respond
from lorasmith.followup.speculation.speculate import speculate
from lorasmith.packaging.pack import pack
from lorasmith.proving.weights.prove import prove
from lorasmith.records.dataset import Example
from lorasmith.reporting.page import write_report
from lorasmith.reporting.several import write_comparison
from lorasmith.runs.stages import open_run
from lorasmith.scoring.tasks import evaluate_tasks
from lorasmith.testset.build import build
from lorasmith.testset.check import check
from lorasmith.testset.rows import require_own_rows
from lorasmith.testset.split import split
from lorasmith.training.train import train
from tests.tiny import save_adapter, save_base, tiny_rows

Command = Callable[[Path, Path], Any]


def opened(path: Path) -> None:
    with open_run(path):
        pass


FOLDERS: dict[str, Command] = {
    "merge": lambda given, output: lorasmith.merge(given / "base", given / "adapter", output),
    "train": lambda given, output: train(given / "base", given / "test.jsonl", output),
    "draft": lambda given, output: train_draft(given / "base", given / "test.jsonl", output, layers=[0]),
    "compress": lambda given, output: compress(given / "base", output),
    "package": lambda given, output: pack(given / "run", output),
    "run": lambda given, output: opened(output),
}

FILES: dict[str, Command] = {
    "prove": lambda given, output: prove(given / "base", given / "adapter", given / "base", output=output),
    "compare": lambda given, output: lorasmith.compare(
        given / "base", given / "adapter", given / "base", given / "test.jsonl", output=output
    ),
    "speculate": lambda given, output: speculate(given / "base", given / "test.jsonl", output=output),
    "check": lambda given, output: check(given / "test.jsonl", [given / "test.jsonl"], output),
    "build": build,
    "split": lambda given, output: split(given / "test.jsonl", output, size=1),
    "respond": lambda given, output: respond(given / "base", given / "test.jsonl", output),
    "report": lambda given, output: write_report(given / "run", output),
    "comparison": lambda given, output: write_comparison([given / "run", given / "run"], output),
}

RECORDS: dict[str, tuple[str, Command]] = {
    "validate": (
        "base.json",
        lambda given, output: lorasmith.validate(given / "base", given / "test.jsonl", output.parent),
    ),
    "tasks": (
        "base_tasks.json",
        lambda given, output: evaluate_tasks(given / "base", given / "test.jsonl", output.parent),
    ),
    "fetch": ("fetched.json", lambda given, output: fetch(output.parent)),
    "statistics": ("statistics.json", lambda given, output: build(given, output.parent / "new.jsonl")),
    "split": ("split.json", lambda given, output: split(given / "test.jsonl", output.parent / "n", size=1)),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    save_adapter(folder / "adapter", save_base(folder / "base"))
    write_examples(folder / "test.jsonl", map(Example.model_validate, tiny_rows(4)))
    (folder / "run").mkdir()
    return folder


def state(path: Path) -> list[tuple[str, int, int, bytes]]:
    """Everything around a path, with contents."""
    return [
        (str(file), file.lstat().st_ino, file.lstat().st_mode, file.read_bytes() if file.is_file() else b"")
        for file in sorted(path.parent.rglob("*"))
    ]


def require_untouched(command: Command, given: Path, output: Path) -> None:
    before = state(output)
    with pytest.raises(LorasmithError) as refused:
        command(given, output)
    assert refused.value.exit_code == 2
    assert str(output) in str(refused.value.where)
    assert state(output) == before


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_of_somebody_else_is_kept(given: Path, tmp_path: Path, command: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text('{"model_type": "llama"}')
    (output / "weights.safetensors").write_bytes(b"the only copy")
    require_untouched(FOLDERS[command], given, output)


@pytest.mark.parametrize("command", FILES)
def test_a_file_of_somebody_else_is_kept(given: Path, tmp_path: Path, command: str) -> None:
    for content in ('{"notes": "mine"}\n', '{"id": "1", "text": "a row of another data set"}\n', "\n"):
        (tmp_path / "out").write_text(content)
        require_untouched(FILES[command], given, tmp_path / "out")


@pytest.mark.parametrize("command", RECORDS)
def test_a_file_of_somebody_else_in_the_folder_of_the_output_is_kept(
    given: Path, tmp_path: Path, command: str
) -> None:
    name, run = RECORDS[command]
    (tmp_path / name).write_text('{"notes": "mine"}')
    require_untouched(run, given, tmp_path / name)


@pytest.mark.parametrize("command", [*FOLDERS, *FILES])
def test_no_pipe_device_or_file_in_the_place_of_a_folder_is_replaced(
    given: Path, tmp_path: Path, command: str
) -> None:
    run = {**FOLDERS, **FILES}[command]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "file").chmod(0o400)
    for name in ("pipe", "device", "folder", "file"):
        require_untouched(run, given, tmp_path / name)


def test_nothing_is_renamed_over_a_device_or_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("pipe", "device"):
        with pytest.raises(UsageError, match="the output is a"):
            write_bytes(tmp_path / name, b"content")
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


def test_a_folder_that_is_reached_by_a_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(UsageError, match="the output is a link"):
        require_own_place(tmp_path / "link", "mark.json", [])


def test_what_a_merge_would_be_made_in_is_not_emptied(given: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        lorasmith.merge(given / "base", given / "adapter", tmp_path / "out")
    assert (tmp_path / ".out.partial" / "mine").read_text() == "mine"


def test_what_lorasmith_has_written_is_replaced(given: Path, tmp_path: Path) -> None:
    lorasmith.merge(given / "base", given / "adapter", tmp_path / "merged")
    lorasmith.merge(given / "base", given / "adapter", tmp_path / "merged", precision="float16")
    check(given / "test.jsonl", [given / "test.jsonl"], tmp_path / "record.json")
    require_own_record(tmp_path / "record.json")
    require_own_rows(given / "test.jsonl")
    for _ in range(2):
        split(given / "test.jsonl", tmp_path / "held_out.jsonl", size=2)
        opened(tmp_path / "run")


def test_a_journal_is_not_written_through_a_link_or_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(UsageError, match="the place of the journal is taken"):
            JournalFile(tmp_path / name, {"format": "f"}, busy="", remedy="")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_is_not_written_through_a_link_of_the_name_that_it_is_made_under(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f".out.{os.getpid()}.partial").symlink_to("precious")
    write_bytes(tmp_path / "out", b"content")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "out").read_bytes() == b"content"
