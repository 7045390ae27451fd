"""Count a test set by source, domain and difficulty, and by their crossings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lorasmith.files.digests import hash_file
from lorasmith.files.jsonl import read_examples
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.dataset import DatasetStatistics, Example

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
