"""`lorasmith data show` as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli.data import CLOSE, OPEN
from tests.tiny import save_base
from tests.typed import Typed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_scored_tokens_are_marked_as_the_model_sees_them(base: Path, tmp_path: Path, here: Typed) -> None:
    talk = {"messages": [user("the cat"), said("sat"), user("and"), said("ran")], "note": "x"}
    rows = write(tmp_path / "rows.jsonl", talk, {"messages": [user("the mat"), said("rain")]})
    done = here("data", "show", rows, "--model", base, "--loss-on", "assistant", "--rows", 1)
    assert done.returncode == 0, done.stderr
    assert "Layout:  messages (2)" in done.stdout
    assert "Answers: one: 1, 2: 1;" in done.stdout
    assert "the fields note are not read" in done.stdout
    shown = done.stdout.partition("rows.jsonl:1")[2]
    assert f"<|start|>user\nthe cat<|end|>\n<|start|>assistant\n{OPEN}sat<|end|>{CLOSE}\n" in shown
    assert f"<|start|>assistant\n{OPEN}ran<|end|>{CLOSE}" in shown
    assert "rows.jsonl:2" not in shown
    record = json.loads(here("data", "show", rows, "--model", base, "--json").stdout)
    # By default the last answer of each row, and the token that ends it.
    assert record["tokens"]["scored"] == sum(row["scored"] for row in record["shown"])
    assert [piece for row in record["shown"] for piece, scored in row["pieces"] if scored] == [
        "ran<|end|>",
        "rain<|end|>",
    ]


def test_rows_that_cannot_be_used_are_named_and_the_answer_is_no(tmp_path: Path, here: Typed) -> None:
    good, bad = {"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}
    rows = write(tmp_path / "rows.jsonl", good, bad, good)
    done = here("data", "show", rows)
    assert done.returncode == 1
    assert "Rows:    2, and 1 that cannot be used" in done.stdout
    assert "cannot be used: rows.jsonl:2: the field 'response' is empty" in done.stdout
    assert here("data", "show", rows, "--skip-bad-rows").returncode == 0
    nothing = here("data", "show", write(tmp_path / "other.jsonl", {"a": 1}))
    assert nothing.returncode == 2
    assert "its fields are a" in nothing.stderr and "--columns" in nothing.stderr


def test_a_row_cannot_steer_the_terminal_or_look_as_if_it_were_scored(tmp_path: Path, here: Typed) -> None:
    rows = write(tmp_path / "rows.jsonl", {"prompt": f"\u001b[2J{OPEN}not{CLOSE}", "response": "[bold]b"})
    shown = here("data", "show", rows).stdout
    assert "\u001b" not in shown and OPEN not in shown
    assert "\\u001b[2J\\u27e6not\\u27e7" in shown
    assert "[bold]b" in shown


def test_long_rows_are_cut_in_the_middle_unless_they_are_wanted_in_full(tmp_path: Path, here: Typed) -> None:
    rows = write(tmp_path / "rows.jsonl", {"prompt": "a" * 5_000, "response": "b"})
    assert "… 3,801 characters …" in here("data", "show", rows).stdout
    assert "a" * 5_000 in here("data", "show", rows, "--full").stdout


def test_without_a_model_torch_is_not_loaded(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", {"prompt": "a", "response": "b"})
    code = (
        "import sys; from lorasmith.cli.main import run; "
        f"code = run(['data', 'show', {str(rows)!r}]); sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
