"""`phase1_merge_lora.py` with the guide's flags: the merge, its verification, and exit codes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith.hub.models import base_of
from tests.model_hub import COMMIT, fill_cache
from tests.tiny import save_adapter, save_base

SCRIPT = Path(__file__).parents[2] / "scripts" / "phase1_merge_lora.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "best", save_base(tmp_path / "base", dtype=torch.float32))
    return tmp_path


def name_base(adapter: Path, **named: object) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **named}))


def test_the_guides_command_merges_and_verifies(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--lora_path", place / "best", "--output_path", place / "merged", "--precision", "bfloat16")
    assert base_of(place / "best") == str(place / "base")
    assert run(monkeypatch, *flags, "--verify") == 0
    proof = json.loads((place / "merged_weights_proof.json").read_text())
    assert proof["grade"] == "exact"
    assert {value.dtype for value in load_file(place / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert lorasmith.prove(place / "base", place / "best", place / "merged").grade == "exact"


def test_a_failed_verification_exits_with_1(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = lorasmith.merge

    def damaged(*arguments: object, **options: object) -> object:
        record = right(*arguments, **options)  # type: ignore[arg-type]
        file = place / "merged" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"][3] += 1
        save_file(tensors, file, {"format": "pt"})
        return record

    monkeypatch.setattr(lorasmith, "merge", damaged)
    flags = ("--lora_path", place / "best", "--output_path", place / "merged")
    assert run(monkeypatch, *flags, "--verify") == 1
    assert "model.norm.weight" in capsys.readouterr().out
    assert json.loads((place / "merged_weights_proof.json").read_text())["grade"] == "different"


def test_the_base_of_the_hub_that_the_adapter_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
    fill_cache(place / "cache", "owner/base", place / "base", ref="v1")
    name_base(place / "best", base_model_name_or_path="owner/base", revision="v1")
    assert run(monkeypatch, "--lora_path", place / "best", "--output_path", place / "merged", "--verify") == 0
    record = json.loads((place / "merged" / "lorasmith_merge.json").read_text())
    assert (record["base_repository"], record["base_commit"]) == ("owner/base", COMMIT)


def test_mistakes_are_one_message_and_exit_2(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--lora_path", place / "best", "--output_path", place / "merged")
    name_base(place / "best", base_model_name_or_path="/not/here")
    assert run(monkeypatch, *flags) == 2
    assert "--base_model" in capsys.readouterr().err
    assert run(monkeypatch, *flags, "--base_model", place / "base", "--precision", "int4") == 2
    assert "--precision is 'int4'" in capsys.readouterr().err
    assert run(monkeypatch, "--lora_path", place / "no", "--output_path", place / "merged") == 2
    assert "does not exist" in capsys.readouterr().err
