"""`phase1_validate_maml.py` with the guide's flags and output paths."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import lorasmith
from tests.tiny import save_adapter, save_base, tiny_rows

SCRIPT = Path(__file__).parents[2] / "scripts" / "phase1_validate_maml.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "best", tmp_path / "base")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    return tmp_path


def test_the_guides_commands_write_the_guides_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = (
        "--model_path",
        place / "best",
        "--test_file",
        place / "test.jsonl",
        "--output_dir",
        place / "r",
    )
    assert run(monkeypatch, *common, "--skip_merged", "--batch_size", 2) == 0
    assert json.loads((place / "r" / "lora_validation.json").read_text())["overall"]["examples"] == 8
    assert not (place / "r" / "merged_validation.json").exists()
    lorasmith.merge(place / "base", place / "best", place / "merged", precision="float32")
    assert run(monkeypatch, *common) == 0
    comparison = json.loads((place / "r" / "comparison.json").read_text())
    assert (comparison["weights_grade"], comparison["behaviour_grade"]) == ("exact", "indistinguishable")
    assert (place / "r" / "merged_validation.json").exists()


def test_a_merge_that_misses_the_criteria_exits_with_1(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(place / "merged", dtype=torch.float32)  # the base itself: nothing was merged
    code = run(
        monkeypatch,
        *("--model_path", place / "best", "--test_file", place / "test.jsonl", "--output_dir", place / "r"),
    )
    assert code == 1
    assert json.loads((place / "r" / "comparison.json").read_text())["weights_grade"] == "different"


def test_a_base_that_is_not_here_is_a_usage_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place / "best" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/not/here"}))
    code = run(
        monkeypatch,
        *("--model_path", place / "best", "--test_file", place / "test.jsonl", "--output_dir", place / "r"),
    )
    assert code == 2
    assert "--base_path" in capsys.readouterr().err
