"""Exit codes 0 and 1 are answers: whatever keeps a command from one has another code, and says what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lorasmith.cli import main
from lorasmith.cli.console import console
from lorasmith.errors import ExitCode
from lorasmith.files.digests import seal_run
from tests.samples import sample_run
from tests.tiny import save_adapter, save_base
from tests.typed import Typed

LORASMITH = [sys.executable, "-m", "lorasmith.cli.main"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a file too many: `verify` says no, and names a file that not every terminal can show."""
    folder = sample_run(tmp_path_factory.mktemp("exit") / "run", count=10)
    seal_run(folder)
    (folder / "é✓.txt").write_text("x")
    return folder


def test_a_bug_is_no_answer_and_says_where_to_report_it(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> int:
        raise ZeroDivisionError("division by zero")

    assert main.guarded(broken) == ExitCode.BUG == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "ZeroDivisionError" in said
    assert "https://github.com/lorasmith/lorasmith/issues" in said


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), 3),
        (KeyboardInterrupt(), 130),
        (main.Terminated(), 143),
        (OSError(28, "No space left on device"), 3),
        (OSError(36, "File name too long", "x" * 300), 2),
        (OSError(40, "Too many levels of symbolic links", "x"), 2),
        (PermissionError(13, "Permission denied", "x"), 3),
        (FileNotFoundError(2, "No such file or directory", "x"), 70),
        (BrokenPipeError(32, "Broken pipe"), 70),
        (RecursionError(), 70),
        (UnicodeEncodeError("utf-8", "a\udcffb", 1, 2, "surrogates not allowed"), 2),
        (UnicodeEncodeError("latin-1", "a✓b", 1, 2, "ordinal not in range(256)"), 70),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_what_is_raised_decides_the_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def broken() -> int:
        raise error

    assert main.guarded(broken) == code
    assert capsys.readouterr().err


def test_a_question_that_nobody_answers_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*arguments: object, **options: object) -> None:
        try:
            raise typer.Abort
        except typer.Abort:
            sys.exit(1)

    monkeypatch.setattr(main, "app", ask)
    assert main.run([]) == ExitCode.BAD_INPUT


@pytest.mark.parametrize(
    "arguments", [["--version"], ["run", "--help"], ["verify", "RUN"], ["verify", "RUN", "--json"]]
)
def test_output_that_nobody_reads_is_no_verdict(run: Path, arguments: list[str]) -> None:
    process = subprocess.Popen(
        [*LORASMITH, *(str(run) if part == "RUN" else part for part in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == ExitCode.OUTPUT_CLOSED == 141
    assert "Traceback" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["verify", "RUN"]])
def test_a_full_standard_output_is_the_machine(run: Path, arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*LORASMITH, *(str(run) if part == "RUN" else part for part in arguments)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == ExitCode.MACHINE, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_neither_answer_nor_files(run: Path, tmp_path: Path, closed: str) -> None:
    page = tmp_path / "page.html"
    command = f'{sys.executable} -m lorasmith.cli.main report "{run}" --output "{page}" {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert page.read_bytes().rstrip().endswith(b"</html>")  # and nothing that was printed


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_that_is_not_utf8_gets_what_it_can_show(run: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for arguments in (["verify", str(run)], ["run", "--help"]):
        done = subprocess.run([*LORASMITH, *arguments], capture_output=True, env=environment, check=False)
        assert done.returncode in (0, 1), done.stderr
        assert done.stdout.decode(encoding)
    done = subprocess.run(
        [*LORASMITH, "verify", str(run), "--json"], capture_output=True, env=environment, check=False
    )
    assert "é✓.txt" in json.loads(done.stdout.decode(encoding))[0]["message"]


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000 + "x", "a\udcffb", "a\nb", "-", "\u202e"], ids=ascii)
@pytest.mark.parametrize(
    "words",
    [
        ["verify", "NAME"],
        ["unpack", "NAME", "--output", "out"],
        ["report", "NAME"],
        ["merge", "--base", "NAME", "--adapter", "a", "--output", "o"],
        ["merge", "--base", "b", "--adapter", "NAME", "--output", "o"],
        ["prove", "--base", "b", "--adapter", "a", "--merged", "NAME"],
        ["validate", "--base", "b", "--test-set", "NAME", "--output", "o"],
        ["testset", "build", "--benchmarks", "NAME", "--output", "o.jsonl"],
        ["run", "--config", "NAME"],
        ["gates", "NAME"],
    ],
    ids=" ".join,
)
def test_odd_names_are_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main.run([name if word == "NAME" else word for word in words])
    said = capsys.readouterr().err
    assert code in (ExitCode.BAD_INPUT, ExitCode.MACHINE), said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_rich_does_not_end_the_process_with_an_answer() -> None:
    with pytest.raises(BrokenPipeError):
        console().on_broken_pipe()


def test_a_file_whose_name_is_not_utf8_is_no_reason_to_stop(tmp_path: Path, here: Typed) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    for folder in (base, adapter):
        Path(os.fsdecode(os.fsencode(folder) + b"/notes\xff\x1b[31m.txt")).write_text("x")
    common = ("--base", base, "--adapter", adapter)
    assert here("merge", *common, "--output", tmp_path / "merged").returncode == 0
    assert here("prove", *common, "--merged", tmp_path / "merged").returncode == 0
