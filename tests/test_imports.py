"""Imports go one way, the light ones stay light, and the public names are what they are."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorasmith

SOURCE = Path(lorasmith.__file__).parent


def test_imports_go_one_way() -> None:
    """The contracts stand in `pyproject.toml`; import-linter holds them."""
    linter = Path(sys.executable).with_name("lint-imports")
    held = subprocess.run(
        [linter, "--no-logo"], cwd=SOURCE.parents[1], capture_output=True, text=True, check=False
    )
    assert held.returncode == 0, held.stdout + held.stderr


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


HEAVY = ("torch", "transformers", "peft", "pyarrow", "numpy", "pydantic", "datasets")


@pytest.mark.parametrize("module", ["lorasmith", "lorasmith.cli.main"])
def test_light_imports_stay_light(module: str) -> None:
    out = run_python(f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])")
    allowed = "['pydantic']"  # typer brings it, lorasmith does not
    assert out.strip() in ("[]", allowed if module.endswith("main") else "[]")


def test_the_light_import_test_can_fail() -> None:
    out = run_python(f"import sys, numpy; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert out.strip() == "['numpy']"


def test_the_report_needs_no_torch() -> None:
    assert (
        run_python("import sys, lorasmith.reporting.page; print('torch' in sys.modules)").strip() == "False"
    )


def test_the_public_names_are_pinned() -> None:
    names = [
        "__version__",
        "compare",
        "compress",
        "merge",
        "prove",
        "respond",
        "run",
        "speculate",
        "train",
        "train_draft",
        "validate",
    ]
    assert sorted(lorasmith.__all__) == names
    assert dir(lorasmith) == names


def test_public_functions_stay_functions_after_every_module_is_imported() -> None:
    for info in pkgutil.walk_packages([str(SOURCE)], prefix="lorasmith."):
        importlib.import_module(info.name)
    for name in (
        "compare",
        "compress",
        "merge",
        "prove",
        "respond",
        "run",
        "speculate",
        "train",
        "train_draft",
        "validate",
    ):
        assert callable(getattr(lorasmith, name))
