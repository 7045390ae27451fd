"""What goes into which archive: the evidence without forbidden text, and the merged model."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorasmith.data.rows import read_examples
from lorasmith.errors import CheckpointError, DataError, InputError
from lorasmith.files import run_layout as layout
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import CARD, folder_files, hash_file
from lorasmith.files.jsonl import dump_row
from lorasmith.files.parquet import read_table
from lorasmith.packaging.archive import Member
from lorasmith.records.base import FileDigest
from lorasmith.records.dataset import Example
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof
from lorasmith.records.release import is_redacted, publishable_row
from lorasmith.records.scoring import GroupMetrics, TaskResult, ValidationResult

RESULTS = "validation_results"
MODEL = "merged_model"
MERGE_RECORD = layout.MERGE.path.rpartition("/")[2]
"""Its name in the merged folder, wherever that lies."""
_REQUIRED = (layout.RUN.path, layout.TEST_SET, layout.VALIDATIONS["adapter"].path, layout.MERGE.path)
_OPEN_COLUMNS = frozenset(
    {
        "id",
        "source",
        "domain",
        "difficulty",
        "logprobs",
        "benchmark",
        "method",
        "metrics",
        "scores",
        "unscored",
    }
)
"""Columns besides plain numbers that a row keeps even when its own text must not be published."""


@dataclass(frozen=True)
class Contents:
    """The members of both archives."""

    results: list[Member]
    model: list[Member]
    redacted: dict[str, str]
    """Member name → SHA-256 of the file in the run that it was made from, where text was taken out."""


def collect(run: Path, report: bytes | None) -> Contents:
    """Gather and check the members; `report` is the page that is packed with the evidence.

    Raises `DataError` for a missing record or a validation on another test set than the one in the run, and
    `CheckpointError` for a merged folder that does not hold exactly the files that the merge wrote.
    """
    _require(run)
    test_set = run / layout.TEST_SET
    test_sha = hash_file(test_set)
    _check_same_test_set(run, test_sha)
    examples = read_examples(test_set)
    hidden = {example.id for example in examples if is_redacted(example.metadata.source)}

    members: list[Member] = []
    redacted: dict[str, str] = {}

    def add(path: str, content: Path | bytes, original: str | None = None) -> None:
        name = f"{RESULTS}/{path}"
        members.append(Member(name, content))
        if original is not None:
            redacted[name] = original

    if hidden:
        add(layout.TEST_SET, _publishable(examples, test_sha), test_sha)
    else:
        add(layout.TEST_SET, test_set)
    for record in (path for file in layout.PACKED for path in run.glob(file.path)):
        path = record.relative_to(run).as_posix()
        if path == layout.BEHAVIOUR.path and hidden:
            add(path, _without_words(record, hidden), hash_file(record))
        else:
            add(path, record)
    for table in sorted((run / "validation").glob("*.parquet")):
        path = table.relative_to(run).as_posix()
        if hidden:
            add(path, _without_text(table, hidden), hash_file(table))
        else:
            add(path, table)
    if report is not None:
        add("report.html", report)
    return Contents(members, _model(run / "merged"), redacted)


def _require(run: Path) -> None:
    for path in _REQUIRED:
        if not (run / path).is_file():
            raise DataError(
                f"{path} is missing from the run",
                where=run,
                expected="a finished run",
                remedy="finish it with `lorasmith run`, then pack it",
            )


def _check_same_test_set(run: Path, test_sha: str) -> None:
    for path in sorted((run / "validation").glob("*.json")):
        answered = path.stem.endswith("_tasks")
        record = read_record(path, TaskResult) if answered else read_record(path, ValidationResult)
        if record.test_set.sha256 != test_sha:
            raise DataError(
                "this validation was made on another test set than the one in the run",
                where=path,
                expected=f"SHA-256 {test_sha} (testset/test_set.jsonl), found {record.test_set.sha256}",
                remedy="validate again on the run's test set",
            )


def _publishable(examples: Iterable[Example], salt: str) -> bytes:
    return b"".join(dump_row(publishable_row(example, salt)) for example in examples)


def _without_words(path: Path, hidden: set[str]) -> bytes:
    """The behaviour proof without token choices and generated texts of rows that must not be published."""
    proof = read_record(path, BehaviourProof)
    changes: dict[str, object] = {"flips": [flip for flip in proof.flips if flip.example not in hidden]}
    if proof.generation is not None:
        kept = [entry for entry in proof.generation.divergences if entry.id not in hidden]
        changes["generation"] = proof.generation.model_copy(update={"divergences": kept})
    return proof.model_copy(update=changes).to_json()


def _without_text(path: Path, hidden: set[str]) -> bytes:
    """The per-example table in which hidden rows keep their names and scores, and nothing made of tokens."""
    table = read_table(path)
    if "id" not in table.column_names:
        raise InputError("the per-example table has no column `id`", where=path, remedy="validate again")
    visible = pa.array([row not in hidden for row in table["id"].to_pylist()])
    for index, field in enumerate(table.schema):
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        if field.name in _OPEN_COLUMNS or number or pa.types.is_boolean(field.type):
            continue
        cleared = pa.compute.if_else(visible, table[field.name], pa.scalar(None, field.type))
        table = table.set_column(index, field.with_nullable(True), cleared)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _model(folder: Path) -> list[Member]:
    return [Member(f"{MODEL}/{path}", folder / path) for path in model_files(folder)]


def model_files(folder: Path) -> list[str]:
    """Names of all files of a merged folder, by name: those that the merge recorded, and a model card.

    Raises `CheckpointError` for one that is missing, that the merge did not write, or that is a link.
    """
    record = read_record(folder / MERGE_RECORD, MergeRecord)
    written = {digest.path for digest in record.files} | {MERGE_RECORD}
    present = {file.relative_to(folder).as_posix() for file in folder_files(folder)}
    missing, extra = sorted(written - present), sorted(present - written)
    if (folder / CARD).is_file():
        present.add(CARD)
    if missing or extra:
        state = f"{missing[0]} is missing" if missing else f"{extra[0]} is not from the merge"
        raise CheckpointError(
            f"the merged folder is not what the merge wrote: {state}",
            where=folder,
            expected=f"the files that {MERGE_RECORD} lists",
            remedy="merge again",
        )
    for path in sorted(present):
        if (folder / path).is_symlink():
            raise CheckpointError("a link cannot be packed", where=folder / path, expected="a file")
    return sorted(present)


def expected_model_digests(run: Path) -> dict[str, str]:
    """Member name → SHA-256 that the merge recorded."""
    record = read_record(run / "merged" / MERGE_RECORD, MergeRecord)
    return {f"{MODEL}/{digest.path}": digest.sha256 for digest in record.files}


# A bill of materials of the merged model (CycloneDX 1.6, ML-BOM): its parts and its figures.


BOM = "bom.cdx.json"
_NAMESPACE = uuid.UUID("5c9de7c1-6a4c-5a50-9a3e-6f1f2c1f6c3e")
"""Namespace of the serial numbers: the same model always gets the same one."""


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
    metric: dict[str, Any] = {"type": name, "value": repr(getattr(group, name)), "slice": part}
    if name == "loss" and group.interval:
        metric["confidenceInterval"] = {
            "lowerBound": repr(group.interval.low),
            "upperBound": repr(group.interval.high),
        }
    return metric
