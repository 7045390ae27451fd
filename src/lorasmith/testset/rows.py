"""Training rows in the shapes people have, as examples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorasmith.benchmarks.base import canonical
from lorasmith.data.rows import Row, fault_error, read_examples
from lorasmith.errors import DataError
from lorasmith.files.digests import hash_file
from lorasmith.files.inputs import open_input
from lorasmith.files.jsonl import MAX_LINE_BYTES, dump_row
from lorasmith.files.output_folder import require_own_file
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.dataset import DatasetStatistics, Example, Metadata


def field(row: Mapping[str, Any], name: str) -> str:
    """A grouping field, from the row itself or its metadata; `unknown` where it is missing or empty."""
    metadata = row.get("metadata")
    value = row.get(name)
    if value in (None, "") and isinstance(metadata, dict):
        value = metadata.get(name)
    return "unknown" if value in (None, "") else str(value)


def to_example(row: Row, path: Path) -> Example:
    """A training row as one of a test set: with its id, or the start of its hash where it has none."""
    if row.example is None:
        raise fault_error(row, path)
    sha256 = hashlib.sha256(canonical(dict(row.value))).hexdigest()
    metadata = row.value.get("metadata")
    body = dict(metadata) if isinstance(metadata, dict) else {}
    record_id = str(row.value.get("id") or body.get("record_id") or sha256[:16])
    body |= {
        "source": str(body.get("source") or row.value.get("source") or path.name.split(".")[0]),
        "domain": field(row.value, "domain"),
        "difficulty": field(row.value, "difficulty"),
        "difficulty_from": str(body.get("difficulty_from") or "field:difficulty"),
        "record_id": record_id,
        "file": path.name,
        "sha256": sha256,
    }
    try:
        about = Metadata.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"field {place!r}: {first['msg']}", where=f"{path}:{row.number}") from error
    return row.example.model_copy(update={"id": record_id, "metadata": about})


# Count a test set by source, domain and difficulty, and by their crossings.


CROSSINGS = (
    ("source", "difficulty"),
    ("source", "domain"),
    ("domain", "difficulty"),
    ("source", "subdomain"),
    ("source", "domain", "difficulty"),
)


def describe(test_set: Path) -> DatasetStatistics:
    """Count the examples of a test set; raises `DataError` for a file that is none."""
    return count(read_examples(test_set), digest(test_set))


def digest(path: Path) -> FileDigest:
    """Name, size and SHA-256 of a file, read now."""
    sha256 = hash_file(path)
    return FileDigest(path=path.name, bytes=path.stat().st_size, sha256=sha256)


def count(
    examples: Sequence[Example],
    file: FileDigest,
    *,
    seed: int | None = None,
    asked: Mapping[str, int] | None = None,
    findings: Iterable[Finding] = (),
) -> DatasetStatistics:
    """The counts of `examples`, groups sorted by name."""
    return DatasetStatistics(
        examples=len(examples),
        file=file,
        seed=seed,
        by_source=_counts(examples, ("source",)),
        by_domain=_counts(examples, ("domain",)),
        by_difficulty=_counts(examples, ("difficulty",)),
        crossings={" × ".join(fields): _counts(examples, fields) for fields in CROSSINGS},
        asked=dict(asked or {}),
        findings=list(findings),
    )


def _counts(examples: Iterable[Example], fields: tuple[str, ...]) -> dict[str, int]:
    counter = Counter(" / ".join(_group(example, field) for field in fields) for example in examples)
    return dict(sorted(counter.items()))


def _group(example: Example, field: str) -> str:
    return str(getattr(example.metadata, field, None) or "unknown")


def require_own_rows(output: Path) -> None:
    """Raise `UsageError` where something is at `output` that is no test set as lorasmith writes it."""
    require_own_file(output, "test set", _begins_canonical)


def _begins_canonical(path: Path) -> bool:
    """Whether the first row has the very bytes that lorasmith would write for it."""
    with open_input(path) as handle:
        line = handle.readline(MAX_LINE_BYTES)
    try:
        return line == dump_row(Example.model_validate_json(line).model_dump(mode="json"))
    except ValidationError:
        return False
