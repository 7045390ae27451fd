"""Imports go one way, the light ones stay light, and the public names are what they are."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorasmith

SOURCE = Path(lorasmith.__file__).parent

LAYERS: list[set[str]] = [
    {"errors", "progress"},
    {"options", "records"},
    {"files"},
    {"checkpoint"},
    {"adapters", "benchmarks"},
    {"models", "executors"},
    {"testset", "training", "merging", "scoring", "proving", "packaging", "reporting", "followup", "remote"},
    {"gates"},
    {"config", "stages"},
    {"results"},
    {"compression", "judge", "preflight", "roundings"},
    {"steps"},
    {"pipeline"},
    {"demo"},
    {"cli"},
]
"""From the bottom up: a module imports from its own package and from the rows above it."""

WEIGHT_PROOF_MAY_IMPORT = {"files", "records", "errors", "progress", "proving"}


def area(module: str) -> str:
    """`lorasmith.files.atomic` → `files`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported(path: Path) -> list[str]:
    """Every lorasmith module that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module]
            if node.module == "lorasmith":
                found += [f"lorasmith.{name.name}" for name in node.names]
    return [name for name in found if name.split(".")[0] == "lorasmith"]


def level(name: str) -> int:
    """The row of an area; an area that stands in none is an error of this test's table."""
    return next(index for index, row in enumerate(LAYERS) if name in row)


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imported(path):
        other = area(name)
        if other in ("", own) or name.startswith("lorasmith.__"):
            continue
        assert level(other) < level(own), f"{own} must not import {name}"


def test_the_table_of_layers_is_complete() -> None:
    present = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in MODULES}
    assert present <= set().union(*LAYERS)


@pytest.mark.parametrize("path", sorted((SOURCE / "proving").glob("weights*.py")), ids=lambda path: path.name)
def test_the_proof_of_the_weights_shares_no_code_with_the_merge(path: Path) -> None:
    assert {area(name) for name in imported(path)} <= WEIGHT_PROOF_MAY_IMPORT
    assert not {name for name in imported(path) if "behaviour" in name}


def test_the_report_reads_records_only() -> None:
    for path in (SOURCE / "reporting").glob("*.py"):
        assert {area(name) for name in imported(path)} <= {
            "records",
            "files",
            "errors",
            "progress",
            "reporting",
            "",
        }


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
