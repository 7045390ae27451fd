"""`vastai_validate_and_merge.sh` in a workspace laid out as the guide's: headings, places, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import lorasmith
from lorasmith.cli import workflow
from lorasmith.files.jsonl import write_rows
from tests.tiny import save_adapter, save_base, tiny_rows

SCRIPT = Path(__file__).parents[2] / "scripts" / "vastai_validate_and_merge.sh"
MODELS = Path("models", "phase1_maml_lora_v2")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """The guide's `/workspace` after training, in small."""
    place = tmp_path / "work space"
    save_adapter(place / MODELS / "best", save_base(place / "models" / "base"))
    (place / "data" / "benchmarks").mkdir(parents=True)
    write_rows(place / "data" / "benchmarks" / "validation_test.jsonl", tiny_rows(6))
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
    write_rows(train, tiny_rows(6, seed=9))
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
    assert (
        lorasmith.prove(workspace / "models" / "base", workspace / MODELS / "best", merged).grade == "exact"
    )
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
    # Given again it keeps what is done and replaces its own results.
    (merged / "model.safetensors").unlink()
    again = run(workspace)
    assert again.returncode == 1 and "kept from before" in again.stdout, again.stderr
    assert (merged / "model.safetensors").is_file()


def test_every_path_can_be_set_and_passing_gates_exit_with_0(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('gate_defaults = "none"\n')
    moved = tmp_path / "elsewhere"
    shutil.move(workspace / MODELS / "best", moved / "adapter")
    shutil.move(workspace / "models" / "base", moved / "base")
    shutil.move(workspace / "data" / "benchmarks" / "validation_test.jsonl", moved / "rows.jsonl")
    places = {
        "LORA_PATH": moved / "adapter",
        "BASE_MODEL": moved / "base",
        "TEST_FILE": moved / "rows.jsonl",
        "MERGED_PATH": moved / "merged",
        "RESULTS_DIR": moved / "results",
        "PACKAGE_DIR": moved / "package",
        "RUN_DIR": moved / "run",
    }
    done = run(
        workspace, **places, CONFIG=tmp_path / "run.toml", BATCH_SIZE=2, DEVICE="cpu", PRECISION="float32"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ All validations passed!" in done.stdout
    assert all(place.exists() for place in places.values())
    assert json.loads((moved / "merged" / "lorasmith_merge.json").read_text())["precision"] == "float32"
    assert not (workspace / "results").exists() and not (workspace / "download_package").exists()


def test_different_weights_exit_with_1(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the gates say, and the package is left all the same."""
    right = lorasmith.merge
    (workspace / "run.toml").write_text('gate_defaults = "none"\n')

    def of_another_adapter(base: Path, adapter: Path, output: Path, **options: object) -> object:
        return right(base, save_adapter(workspace / "other", base, seed=5), output, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lorasmith, "merge", of_another_adapter)
    places = ("merged_path", "results_dir", "package_dir", "run_dir")
    code = workflow.main(
        [
            *("--lora_path", str(workspace / MODELS / "best")),
            *("--test_file", str(workspace / "data" / "benchmarks" / "validation_test.jsonl")),
            *("--config", str(workspace / "run.toml")),
            *(text for name in places for text in (f"--{name}", str(workspace / "out" / name))),
        ]
    )
    assert code == 1
    assert (workspace / "out" / "package_dir" / "merged_model.tar.gz").is_file()


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
