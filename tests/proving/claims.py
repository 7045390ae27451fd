"""Folders of a proof, and the record that lorasmith's own merge leaves in its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasmith.files import atomic, digests
from lorasmith.records.merging import MergedTensor, MergeRecord
from lorasmith.records.proof import WeightProof
from tests.proving.small import (
    SHAPES,
    adapter_tensors,
    base_tensors,
    module,
    write_adapter,
    write_model,
)


def folders(place: Path, **config: Any) -> tuple[Path, Path]:
    """Base and adapter."""
    base = write_model(place / "base", base_tensors())
    return base, write_adapter(place / "adapter", adapter_tensors(), **config)


def claim(base: Path, adapters: list[Path], merged: Path, **claims: Any) -> None:
    """Write the record that lorasmith's merge leaves in its output."""
    (merged / "lorasmith_merge.json").unlink(missing_ok=True)
    record = MergeRecord(
        **{
            "lorasmith_version": "0",
            "base_sha256": digests.digest_folder(base),
            "adapter_sha256": [digests.digest_folder(adapter) for adapter in adapters],
            "adapter_weights": [1.0] * len(adapters),
            "precision": "base",
            "rounding": "nearest",
            "tensors": [],
            "copied": 0,
            "cast": 0,
            "elements_updated": 0,
            "elements_swallowed": 0,
            "swallowed_fraction": 0.0,
            "files": digests.describe(digests.folder_files(merged), merged),
            **claims,
        }
    )
    atomic.write_record(merged / "lorasmith_merge.json", record)


def codes(proof: WeightProof) -> set[str]:
    """Codes of the findings, without mere notes."""
    return {finding.code for finding in proof.findings if finding.severity != "note"}


def entries(**roundings: str) -> list[MergedTensor]:
    """What a calibrated merge says of each tensor: calibrated but for those named by keyword."""
    others = {name: rounding for rounding, name in roundings.items()}
    return [
        MergedTensor(
            name=f"{module(layer, name)}.weight",
            formula="W + s·B·A",
            adapter_tensors=[],
            shape=list(shape),
            dtype_base="BF16",
            dtype_merged="BF16",
            elements=shape[0] * shape[1],
            changed=0,
            swallowed=0,
            rounding=others.get(name, "calibrated"),
        )
        for layer in range(2)
        for name, shape in SHAPES.items()
    ]


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
