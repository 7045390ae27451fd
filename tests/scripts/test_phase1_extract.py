"""`phase1_extract_base_responses.py` with the guide's flags and output path."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.tiny import save_base, tiny_rows

SCRIPT = Path(__file__).parents[2] / "scripts" / "phase1_extract_base_responses.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def test_the_guides_command_writes_the_guides_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_base(tmp_path / "merged")
    data, output = tmp_path / "training_data_clean.jsonl", tmp_path / "phase1e" / "base_responses.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(4)))
    flags = ("--model_path", tmp_path / "merged", "--data_file", data, "--output_file", output)
    assert run(monkeypatch, *flags, "--max_new_tokens", 4) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["input"] for row in rows] == tiny_rows(4)
    assert "Responses: 4" in capsys.readouterr().out
    with data.open("a") as more:
        more.write(json.dumps({"text": "no prompt"}) + "\n")
    assert run(monkeypatch, *flags, "--max_new_tokens", 4) == 1
    assert run(monkeypatch, *flags, "--max_new_tokens", 5) == 2
    assert "other settings" in capsys.readouterr().err
