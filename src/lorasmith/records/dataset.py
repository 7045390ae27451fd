"""Records of test sets: the example, its metadata, the counts."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict

from lorasmith.records.base import FileDigest, Finding, Part, Record


class Metadata(Part):
    """Where an example comes from and how it is grouped; a benchmark adds what its scorer needs."""

    model_config = ConfigDict(extra="allow")

    source: str
    """The benchmark's or the file's name."""
    domain: str = "unknown"
    difficulty: str = "unknown"
    difficulty_from: str = "none"
    """Policy and field that gave the difficulty, such as `guide:level`."""
    record_id: str = ""
    """The row's own id in its source."""
    file: str = ""
    sha256: str = ""
    """SHA-256 of the source row's canonical JSON."""

    def extra(self) -> dict[str, Any]:
        """What the benchmark added (choices, golds, tests, …)."""
        return dict(self.model_extra or {})


class Example(Part):
    """One row of a test set or training file: `{id, prompt, response, metadata}`."""

    id: str
    prompt: str
    response: str
    metadata: Metadata

    @property
    def content(self) -> tuple[str, str]:
        """Prompt and response without regard to case and white space: equal for copies of a row."""
        return " ".join(self.prompt.casefold().split()), " ".join(self.response.casefold().split())


class DatasetStatistics(Record):
    """`statistics.json`: how many examples, by group and by crossing of groups."""

    FORMAT: ClassVar[str] = "lorasmith/dataset-statistics/1"

    examples: int
    file: FileDigest
    seed: int | None = None
    by_source: dict[str, int]
    by_domain: dict[str, int]
    by_difficulty: dict[str, int]
    crossings: dict[str, dict[str, int]]
    """`source × difficulty` and so on, each `a / b` → count."""
    asked: dict[str, int] = {}
    """Per source, how many were asked for (fewer are present only where the file has fewer)."""
    findings: list[Finding] = []


class RejectedRow(Part):
    """A row that was not used. Its text is never repeated here: some benchmarks may not appear in plain."""

    benchmark: str
    file: str
    row: int
    reason: str
    sha256: str = ""
    """SHA-256 of the row's canonical JSON, to find it again in one's own copy."""


class DatasetFindings(Record):
    """`findings.json`: what was wrong with the files, and every row that was left out."""

    FORMAT: ClassVar[str] = "lorasmith/dataset-findings/1"

    findings: list[Finding] = []
    rejected: list[RejectedRow] = []


class FetchedFile(Part):
    """A benchmark file from the hub."""

    benchmark: str
    repository: str
    revision: str
    path: str
    """Relative to the folder of the record."""
    bytes: int
    sha256: str
    checked_against: str


class FetchRecord(Record):
    """`fetched.json`: what was downloaded, and what could not be."""

    FORMAT: ClassVar[str] = "lorasmith/benchmarks-fetched/1"

    files: list[FetchedFile] = []
    findings: list[Finding] = []


class SplitRecord(Record):
    """`split.json`: a seeded hold-out from a training file."""

    FORMAT: ClassVar[str] = "lorasmith/split/1"

    train: FileDigest
    test: FileDigest
    size: int
    seed: int
    stratify_by: list[str]
    strata: dict[str, dict[str, int]]
    """Stratum → `{rows, held_out}`."""
    removed_from_train: bool
    train_after: FileDigest | None = None
    """The training file without the rows held out; None when it was left as it was."""
    backup: str | None = None
    """Name of the copy of the training file as it was before."""
    rows_removed: int = 0
    """At least `size`: further training rows with a prompt that was held out go as well."""
    findings: list[Finding] = []


class ContaminationRecord(Record):
    """`contamination.json`: is the test set independent of the training data?"""

    FORMAT: ClassVar[str] = "lorasmith/contamination/1"

    verdict: str
    """`independent`, `contaminated` or `not checked`."""
    reason: str = ""
    test: FileDigest | None = None
    train: list[FileDigest] = []
    rows_test: int = 0
    rows_train: int = 0
    parameters: dict[str, Any] = {}
    counts: dict[str, int] = {}
    """Hits by kind: `exact`, `ngram`, `near`; `test_rows` affected; `dropped` from the test set."""
    hits: list[ContaminationHit] = []
    """The strongest of each test row and kind; `counts` counts all."""


class ContaminationHit(Part):
    """One test row that the training data holds too."""

    kind: str
    test_id: str
    train_id: str
    train_file: str
    score: float
    """1.0 for exact, else overlap or estimated Jaccard similarity in 0..1."""


ContaminationRecord.model_rebuild()
