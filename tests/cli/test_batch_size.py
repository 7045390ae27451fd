"""`--batch-size`: a number of rows, or auto."""

from __future__ import annotations

import pytest

from lorasmith.cli.main import run

COMMAND = ["run", "--base", "b", "--adapter", "a", "--test-set", "t", "--output", "o", "--print-config"]


def test_auto_is_as_good_as_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(COMMAND) == 0
    plain = capsys.readouterr().out
    assert run([*COMMAND, "--batch-size", "auto"]) == 0
    assert capsys.readouterr().out == plain
    assert run([*COMMAND, "--batch-size", "7"]) == 0
    assert "batch_size = 7" in capsys.readouterr().out


def test_anything_else_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND, "--batch-size", "many"]) == 2
    assert "--batch-size" in capsys.readouterr().err
