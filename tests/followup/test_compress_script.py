"""`setup_phase2_compression.sh`: the plan first, the fallacy of 540 MB in words, then the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_base

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup_phase2_compression.sh"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("script") / "merged", hidden_size=64, intermediate_size=128)


def run(workspace: Path, merged: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "WORKSPACE": str(workspace),
        "MODEL_PATH": str(merged),
        "PYTHON": sys.executable,
        **settings,
    }
    return subprocess.run(["bash", SCRIPT], capture_output=True, text=True, env=environment, check=False)


def test_an_impossible_target_is_explained_and_can_stop_it(tmp_path: Path, merged: Path) -> None:
    done = run(tmp_path, merged, TARGET_SIZE="2kB", ONLY_IF_REACHABLE="1")
    assert done.returncode == 1, done.stderr
    assert "No method reaches it" in done.stdout
    assert "INT4 is four bits for each weight" in done.stdout
    assert "Step 2/2" not in done.stdout


def test_wrong_input_stops_before_the_work(tmp_path: Path, merged: Path) -> None:
    done = run(tmp_path, tmp_path / "absent")
    assert done.returncode == 2
    assert "Step 2/2" not in done.stdout
    assert run(tmp_path, merged, TARGET_SIZE="small").returncode == 2


def test_it_goes_on_to_the_real_size(tmp_path: Path, merged: Path) -> None:
    """Up to the library itself: a format of nonsense shows that the command was reached with its settings."""
    done = run(tmp_path, merged, FORMAT="gguf:nonsense")
    assert done.returncode == 2
    assert "Step 2/2: compress to gguf:nonsense (rtn)" in done.stdout
    assert "quality is not measured" in done.stdout
    assert "--format is 'gguf:nonsense'" in done.stderr
