"""The bill of materials: valid after its schema, with the hashes of what is really in the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.packaging.pack import pack
from tests.samples import sample_run, sha


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package."""
    folder = tmp_path_factory.mktemp("bom")
    pack(sample_run(folder / "run", count=15), folder / "package")
    return folder / "package"


def _document(package: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((package / "bom.cdx.json").read_text())
    return found


def test_it_is_valid(package: Path) -> None:
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="cyclonedx-python-lib is not installed"
    )
    from cyclonedx.schema import SchemaVersion

    text = (package / "bom.cdx.json").read_text()
    errors = validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert errors is None, str(errors)


def test_it_names_what_the_model_was_made_of(package: Path) -> None:
    document = _document(package)
    hashes = {part["bom-ref"]: part["hashes"][0]["content"] for part in document["components"]}
    assert hashes["base"] == sha("base")
    assert hashes["adapter-1"] == sha("adapter")
    assert document["dependencies"] == [{"ref": "merged", "dependsOn": ["base", "adapter-1"]}]


def test_its_hashes_and_figures_are_those_of_the_package(package: Path) -> None:
    manifest = json.loads((package / "manifest.json").read_text())
    model = _document(package)["metadata"]["component"]
    listed = {f"merged_model/{part['name']}": part["hashes"][0]["content"] for part in model["components"]}
    assert listed == {m["path"]: m["sha256"] for m in manifest["contents"]["merged_model.tar.gz"]}
    archives = {archive["path"]: archive["sha256"] for archive in manifest["archives"]}
    assert model["hashes"][0]["content"] == archives["merged_model.tar.gz"]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    record = json.loads((package.parent / "run" / "validation" / "merged.json").read_text())
    overall = next(m for m in metrics if m["type"] == "loss" and m["slice"] == "all examples")
    assert float(overall["value"]) == record["overall"]["loss"]
    assert float(overall["confidenceInterval"]["upperBound"]) == record["overall"]["interval"]["high"]
    slices = {m["slice"] for m in metrics}
    assert {"source=DROP", "difficulty=hard", "domain=code"} <= slices
