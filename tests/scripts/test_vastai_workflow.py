"""`vastai_validate_and_merge.sh` in a workspace laid out as the guide's: headings, places, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lorasmith
from lorasmith.cli import workflow
from lorasmith.files.jsonl import write_rows
from lorasmith.records.release import GateRecord
from lorasmith.runs.results import RunResult
from tests.tiny import save_adapter, save_base, tiny_rows

SCRIPT = Path(__file__).parents[2] / "scripts" / "vastai_validate_and_merge.sh"
MODELS = Path("models", "phase1_maml_lora_v2")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """The guide's `/workspace` after training, in small."""
    place = tmp_path / "work space"
    save_adapter(place / MODELS / "best", save_base(place / "models" / "base"))
    (place / "data" / "benchmarks").mkdir(parents=True)
    write_rows(place / "data" / "benchmarks" / "validation_test.jsonl", tiny_rows(4))
    return place


def run(workspace: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    values = {name: str(value) for name, value in settings.items()}
    environment = {**os.environ, "WORKSPACE": str(workspace), "PYTHON": sys.executable, **values}
    return subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, cwd=workspace, check=False
    )


def test_the_workflow_leaves_what_the_guide_downloads(workspace: Path) -> None:
    """The guide's own gates: a model of random weights misses them, so the exit code is 1."""
    train = workspace / "data" / "phase1" / "answers" / "training_data_clean.jsonl"
    train.parent.mkdir(parents=True)
    write_rows(train, tiny_rows(4, seed=9))
    done = run(workspace)
    assert done.returncode == 1, done.stderr
    headings = re.findall(r"^(Phase 1D.*|Step \d/\d: .*|VALIDATION RESULTS.*)$", done.stdout, re.MULTILINE)
    assert headings == [
        "Phase 1D: Validation & Merge (Vast.ai)",
        "Step 1/5: Validate LoRA Model",
        "Step 2/5: Merge LoRA Weights",
        "Step 3/5: Verify Merged Weights",
        "Step 4/5: Validate Merged Model",
        "Step 5/5: Results Summary & Packaging",
        "VALIDATION RESULTS SUMMARY",
    ]
    assert "✗ NOT all validations passed" in done.stdout and "IDENTICAL" not in done.stdout
    merged = workspace / MODELS / "merged"
    base, adapter = workspace / "models" / "base", workspace / MODELS / "best"
    assert lorasmith.prove(base, adapter, merged).grade != "different"
    results = workspace / "results" / "phase1_validation"
    names = ("lora_validation.json", "merged_validation.json", "comparison.json", "report.html")
    assert all((results / name).is_file() for name in names)
    contamination = workspace / "results" / "phase1_run" / "testset" / "contamination.json"
    assert json.loads(contamination.read_text())["verdict"] != "not checked"
    package = workspace / "download_package"
    for archive in ("validation_results.tar.gz", "merged_model.tar.gz"):
        with tarfile.open(package / archive) as opened:
            assert len(opened.getnames()) > 3
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=package, capture_output=True, check=False)
    assert checked.returncode == 0


def test_every_path_can_be_set(workspace: Path) -> None:
    """With `echo` as its Python the script shows what it would call."""
    merged = workspace / MODELS / "merged"
    assert f"--merged_path {merged}" in run(workspace, PYTHON="echo").stdout
    flags = {
        "LORA_PATH": "--lora_path",
        "BASE_MODEL": "--base_model",
        "TEST_FILE": "--test_file",
        "TRAIN_FILE": "--train_file",
        "MERGED_PATH": "--merged_path",
        "RESULTS_DIR": "--results_dir",
        "PACKAGE_DIR": "--package_dir",
        "RUN_DIR": "--run_dir",
        "PRECISION": "--precision",
        "ROUNDING": "--rounding",
        "DEVICE": "--device",
        "BATCH_SIZE": "--batch_size",
        "CONFIG": "--config",
    }
    elsewhere = workspace.parent / "elsewhere"
    elsewhere.mkdir()
    values = {name: elsewhere / name.lower() for name in flags}
    values["TEST_FILE"].touch()
    done = run(workspace, PYTHON="echo", **values)
    assert done.returncode == 0, done.stderr
    assert str(workspace) not in done.stdout
    for name, flag in flags.items():
        assert f" {flag} {values[name]}" in done.stdout


def test_passing_gates_exit_with_0_different_weights_with_1_and_a_second_time_keeps_what_is_done(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "run.toml").write_text('gate_defaults = "none"\n')
    out = workspace / "out"
    found: list[RunResult] = []
    right = lorasmith.run

    def keep(*arguments: Any, **options: Any) -> RunResult:
        found.append(right(*arguments, **options))
        return found[-1]

    def code() -> int:
        places = ("merged_path", "results_dir", "package_dir", "run_dir")
        inputs = ("--test_file", workspace / "data" / "benchmarks" / "validation_test.jsonl")
        flags = ("--lora_path", workspace / MODELS / "best", *inputs, "--config", workspace / "run.toml")
        return workflow.main(
            [*map(str, flags), *(text for name in places for text in (f"--{name}", str(out / name)))]
        )

    monkeypatch.setattr(lorasmith, "run", keep)
    assert code() == 0
    assert "✓ All validations passed!" in capsys.readouterr().out
    for lost in ("merged_path/model.safetensors", "package_dir/merged_model.tar.gz"):
        (out / lost).unlink()
    assert code() == 0
    assert "Validate base" not in capsys.readouterr().err  # no bar: nothing was scored again
    different = found[-1].weights.model_copy(update={"grade": "different"})
    failed = [
        result.model_copy(update={"verdict": "fail"}) if result.gate.name == "weights" else result
        for result in found[-1].gates.gates
    ]
    wrong = replace(found[-1], weights=different, gates=GateRecord.of(failed))
    monkeypatch.setattr(lorasmith, "run", lambda *_, **__: wrong)
    assert code() == 1
    assert "DIFFERENT" in capsys.readouterr().out
    for kept in ("merged_path/model.safetensors", "package_dir/merged_model.tar.gz"):
        assert (out / kept).is_file()


def test_wrong_input_exits_with_2_before_anything_is_done(workspace: Path) -> None:
    merged = workspace / MODELS / "merged"
    merged.mkdir()
    (merged / "precious.txt").write_text("not made by this workflow")
    done = run(workspace)
    assert done.returncode == 2 and "MERGED_PATH" in done.stderr and "Traceback" not in done.stderr
    assert (merged / "precious.txt").is_file() and not (workspace / "results").exists()
    done = run(workspace, MERGED_PATH=workspace / "m", LORA_PATH=workspace / "nothing")
    assert done.returncode == 2 and "does not exist" in done.stderr
    done = run(workspace, TEST_FILE=workspace / "none.jsonl")
    assert done.returncode == 2 and "convert_benchmarks_to_test.py" in done.stderr
