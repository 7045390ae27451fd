"""A bill of materials of the merged model (CycloneDX 1.6, ML-BOM): its parts and its figures."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from lorasmith.files.atomic import read_record
from lorasmith.packaging.contents import MERGE_RECORD, MODEL
from lorasmith.records.base import FileDigest
from lorasmith.records.merging import MergeRecord
from lorasmith.records.scoring import GroupMetrics, ValidationResult

BOM = "bom.cdx.json"
_NAMESPACE = uuid.UUID("5c9de7c1-6a4c-5a50-9a3e-6f1f2c1f6c3e")
"""Of serial numbers: the same model always gets the same one."""


def bill_of_materials(run: Path, model: list[FileDigest], archive: FileDigest) -> bytes:
    """The document as JSON: a function of the run alone, without dates.

    `model` are the members of the model's archive, `archive` is that archive. cyclonedx-python-lib has no
    `modelCard`, so that the JSON is written here after the specification (ECMA-424).
    """
    merge = read_record(run / "merged" / MERGE_RECORD, MergeRecord)
    role = "merged" if (run / "validation" / "merged.json").is_file() else "adapter"
    result = read_record(run / "validation" / f"{role}.json", ValidationResult)
    base = _component("base", "base model", merge.base_sha256)
    adapters = [
        _component(f"adapter-{place}", "LoRA adapter", sha)
        for place, sha in enumerate(merge.adapter_sha256, 1)
    ]
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, archive.sha256)}",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": "lorasmith", "version": merge.lorasmith_version}
                ]
            },
            "component": {
                "bom-ref": "merged",
                "type": "machine-learning-model",
                "name": f"{result.model.architecture} with merged LoRA",
                "hashes": _hashes(archive.sha256),
                "modelCard": _card(result, merge),
                "pedigree": {"ancestors": [_as_ancestor(part) for part in (base, *adapters)]},
                "components": [
                    {
                        "type": "file",
                        "bom-ref": f"file:{member.path}",
                        "name": member.path.removeprefix(f"{MODEL}/"),
                        "hashes": _hashes(member.sha256),
                    }
                    for member in model
                ],
            },
        },
        "components": [base, *adapters, _test_set(result)],
        "dependencies": [{"ref": "merged", "dependsOn": ["base", *(part["bom-ref"] for part in adapters)]}],
    }
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _component(reference: str, name: str, sha256: str) -> dict[str, Any]:
    """A model folder, known by the digest over its files."""
    return {
        "bom-ref": reference,
        "type": "machine-learning-model",
        "name": name,
        "hashes": _hashes(sha256),
        "description": "The hash is taken over the lines `sha256  path` of the folder's files.",
    }


def _as_ancestor(part: dict[str, Any]) -> dict[str, Any]:
    """The same component under a reference of its own: references are unique within a document."""
    return {**part, "bom-ref": f"{part['bom-ref']}-ancestor"}


def _test_set(result: ValidationResult) -> dict[str, Any]:
    return {
        "bom-ref": "test-set",
        "type": "data",
        "name": "test set",
        "hashes": _hashes(result.test_set.sha256),
        "data": [{"type": "dataset", "name": "test set"}],
    }


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _card(result: ValidationResult, merge: MergeRecord) -> dict[str, Any]:
    metrics = [_metric(name, result.overall, "all examples") for name in ("loss", "perplexity")]
    for kind in ("source", "domain", "difficulty"):
        for name, group in result.groups.get(kind, {}).items():
            metrics.append(_metric("loss", group, f"{kind}={name}"))
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "modelArchitecture": result.model.architecture,
            "datasets": [{"ref": "test-set"}],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "properties": [
            {"name": "lorasmith:parameters", "value": str(result.model.parameters)},
            {"name": "lorasmith:precision", "value": merge.precision},
            {"name": "lorasmith:rounding", "value": merge.rounding},
            {"name": "lorasmith:swallowed_fraction", "value": repr(merge.swallowed_fraction)},
        ],
    }


def _metric(name: str, group: GroupMetrics, part: str) -> dict[str, Any]:
    found: dict[str, Any] = {"type": name, "value": repr(getattr(group, name)), "slice": part}
    if name == "loss" and group.interval:
        found["confidenceInterval"] = {
            "lowerBound": repr(group.interval.low),
            "upperBound": repr(group.interval.high),
        }
    return found
