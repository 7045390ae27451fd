"""The command line as a person types it: help at once, exit codes, one message for a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from lorasmith.cli import COMMANDS, GROUPS
from lorasmith.files.jsonl import write_rows
from tests.tiny import save_adapter, save_base, tiny_rows
from tests.typed import Typed

LORASMITH = [sys.executable, "-m", "lorasmith.cli.main"]
PATHS = [[name] for name, _ in COMMANDS] + [[group, name] for group, _, inner in GROUPS for name, _ in inner]

AT_ONCE = 3.0
"""What answering `--help` may cost, in imports of typer alone: it costs 1.5 of them, and 11 with torch."""


def lorasmith(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LORASMITH, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/`, `adapter/`, `test.jsonl` in one folder."""
    folder = tmp_path_factory.mktemp("models")
    save_adapter(folder / "adapter", save_base(folder / "base"))
    write_rows(folder / "test.jsonl", tiny_rows(8))
    return folder


HELPS = """
import contextlib, io, json, sys, time
from lorasmith.cli.main import run
started = time.process_time()
for path in json.loads(sys.argv[1]):
    printed, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(printed):
        code = run([*path, "--help"])
    seconds = started + time.process_time() - began
    loaded = [name for name in ("torch", "transformers", "ray") if name in sys.modules]
    print(json.dumps([code, printed.getvalue(), seconds, loaded]))
"""
"""Prints every help in one process; the time of each is that of the start and its own, as if alone."""


class Help(NamedTuple):
    code: int
    text: str
    seconds: float
    loaded: list[str]


@cache
def every_help(attempt: int) -> dict[str, Help]:
    """The answer of each path to `--help`, by its words; another `attempt` measures anew."""
    paths = [[], *PATHS]
    command = [sys.executable, "-c", HELPS, json.dumps(paths)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {" ".join(path): Help(*json.loads(line)) for path, line in zip(paths, lines, strict=True)}


@cache
def typer_alone(attempt: int) -> float:
    code = "import time, typer, typer.rich_utils; print(time.process_time())"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


@pytest.mark.parametrize("path", [[], *PATHS], ids=lambda path: " ".join(path) or "lorasmith")
def test_help_has_an_example_and_answers_at_once(path: list[str]) -> None:
    words = " ".join(path)
    code, text, _, loaded = every_help(0)[words]
    assert code == 0
    assert "lorasmith" in text
    assert path == [] or f"Example: `lorasmith {words}" in " ".join(text.split())
    assert loaded == []
    # One after the other, as the machine's speed moves; again, as it may move between the two.
    assert any(every_help(n)[words].seconds < AT_ONCE * typer_alone(n) for n in range(3))


def test_help_of_the_command_as_it_is_installed() -> None:
    done = lorasmith("--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout == every_help(0)[""].text


def test_version() -> None:
    assert lorasmith("--version").stdout.startswith("lorasmith 0.")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["merge", "--bas", "x"], ["merge"], ["merge", "--base", "b"], ["run", "--seed", "x"]],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    done = lorasmith(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_merge_prove_and_what_they_print(models: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = lorasmith(
        "merge", "--base", models / "base", "--adapter", models / "adapter", "--output", merged, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "lorasmith/merge/1"
    proof = lorasmith("prove", "--base", models / "base", "--adapter", models / "adapter", "--merged", merged)
    assert proof.returncode == 0, proof.stderr
    assert "Weights: exact" in proof.stdout


def test_a_damaged_merge_is_different_and_ends_with_1(models: Path, tmp_path: Path, here: Typed) -> None:
    merged = tmp_path / "merged"
    assert not here(
        "merge", "--base", models / "base", "--adapter", models / "adapter", "--output", merged
    ).returncode
    shard = merged / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = lorasmith("prove", "--base", models / "base", "--adapter", models / "adapter", "--merged", merged)
    assert done.returncode == 1
    assert "Weights: different" in done.stdout


def test_validate_writes_and_shows_its_result(models: Path, tmp_path: Path, here: Typed) -> None:
    done = here(
        "validate", "--model", models / "base", "--adapter", models / "adapter",
        "--test-set", models / "test.jsonl", "--output", tmp_path / "v",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "LoRA Model Results:" in done.stdout
    assert {path.name for path in (tmp_path / "v").iterdir()} == {"adapter.json", "adapter.parquet"}


def good(models: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "base": models / "base",
        "adapter": models / "adapter",
        "test-set": models / "test.jsonl",
        "output": tmp_path / "run",
    }


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


ROW = '{"id": "1", "prompt": "a", "response": "b", "metadata": {"source": "s"}}\n'


@pytest.mark.parametrize(
    ("option", "make", "said"),
    [
        ("base", lambda tmp: tmp / "absent", "absent"),
        ("adapter", lambda tmp: tmp / "absent", "absent"),
        ("adapter", lambda tmp: (tmp / "empty").mkdir() or tmp / "empty", "adapter_config.json"),
        ("test-set", lambda tmp: tmp / "absent.jsonl", "absent.jsonl"),
        ("test-set", lambda tmp: write(tmp / "t.jsonl", ""), "no rows"),
        ("test-set", lambda tmp: write(tmp / "t.jsonl", ROW + '{"id": "2", "prompt": "a"}\n'), "t.jsonl:2"),
        ("test-set", lambda tmp: write(tmp / "t.jsonl", ROW + "{broken\n"), "t.jsonl:2"),
        ("test-set", lambda tmp: write(tmp / "t.jsonl", ROW + ROW), "t.jsonl:2"),
    ],
    ids=[
        "no base", "no adapter", "empty adapter", "no test set",
        "empty test set", "no response", "not JSON", "doubled id",
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_exit_2(
    models: Path, tmp_path: Path, option: str, make: object, said: str, here: Typed
) -> None:
    options = {**good(models, tmp_path), option: make(tmp_path)}  # type: ignore[operator]
    done = here("run", *(part for name, path in options.items() for part in (f"--{name}", path)))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


def test_an_adapter_for_another_base_is_refused(models: Path, tmp_path: Path, here: Typed) -> None:
    wrong = save_base(tmp_path / "wrong", hidden_size=64)
    options = {**good(models, tmp_path), "base": wrong}
    done = here("run", *(part for name, path in options.items() for part in (f"--{name}", path)))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "merged").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_with_3_and_leaves_nothing_half_written(models: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        done = lorasmith(
            "merge", "--base", models / "base", "--adapter", models / "adapter", "--output", disk / "merged"
        )
        assert done.returncode == 3, done.stderr
        assert "free" in done.stderr
        assert not (disk / "merged").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may write to: root is stopped by a read-only file system only."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.geteuid():
        yield folder
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], check=False).returncode:
        pytest.skip("this machine does not let tests mount a read-only disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("command", ["run", "merge"])
def test_a_folder_that_cannot_be_written_to_ends_with_3(
    models: Path, tmp_path: Path, unwritable: Path, command: str, here: Typed
) -> None:
    options = {**good(models, tmp_path), "output": unwritable / "out"}
    if command == "merge":
        del options["test-set"]
    done = here(command, *(part for name, path in options.items() for part in (f"--{name}", path)))
    assert done.returncode == 3, done.stderr
    assert str(unwritable) in done.stderr
    assert "Traceback" not in done.stderr


def test_the_printed_config_is_read_again(models: Path, tmp_path: Path, here: Typed) -> None:
    arguments = [part for name, path in good(models, tmp_path).items() for part in (f"--{name}", path)]
    printed = here("run", *arguments, "--seed", 7, "--print-config")
    assert printed.returncode == 0, printed.stderr
    assert "seed = 7" in printed.stdout
    config = write(tmp_path / "run.toml", printed.stdout)
    again = here("run", "--config", config, "--print-config")
    assert again.stdout == printed.stdout
