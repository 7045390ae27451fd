"""`scripts/new-benchmark` writes stubs that the contract test accepts: the recipe for a sixth works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
SCRIPT = ROOT / "scripts" / "new-benchmark"


def copy_of_the_project(folder: Path) -> Path:
    for part in ("src/lorasmith", "tests/benchmarks", "tests/cases"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_stubs_of_a_new_benchmark_fulfil_the_contract(tmp_path: Path) -> None:
    root = copy_of_the_project(tmp_path / "project")
    made = subprocess.run(
        [sys.executable, SCRIPT, "Trivia-QA", "--root", root], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert "src/lorasmith/benchmarks/trivia_qa.py" in made.stdout
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/benchmarks/test_contract.py",
    ]
    command += ["-k", "Trivia or belongs or names"]
    tested = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout[-3000:]
    listing = (
        "from lorasmith.benchmarks.registry import BENCHMARKS; print([found.name for found in BENCHMARKS])"
    )
    listed = subprocess.run(
        [sys.executable, "-c", listing], env=environment, capture_output=True, text=True, check=True
    )
    assert "Trivia-QA" in listed.stdout


def test_without_its_case_file_the_contract_fails(tmp_path: Path) -> None:
    root = copy_of_the_project(tmp_path / "project")
    subprocess.run([sys.executable, SCRIPT, "TriviaQA", "--root", root], check=True, capture_output=True)
    (root / "tests" / "cases" / "benchmarks" / "triviaqa.json").unlink()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/benchmarks/test_contract.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    tested = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert tested.returncode != 0


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    root = copy_of_the_project(tmp_path / "project")
    before = (root / "src" / "lorasmith" / "benchmarks" / "drop.py").read_text()
    made = subprocess.run(
        [sys.executable, SCRIPT, "Drop", "--root", root], capture_output=True, text=True, check=False
    )
    assert made.returncode == 2 and "already" in made.stderr
    assert (root / "src" / "lorasmith" / "benchmarks" / "drop.py").read_text() == before
