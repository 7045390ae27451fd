"""Records of compression: the sizes that are possible, and what a compressed model lost."""

from __future__ import annotations

from typing import Any, ClassVar

from lorasmith.records.base import FileDigest, Finding, Part, Record
from lorasmith.records.proof import TokenComparison
from lorasmith.records.release import GateResult
from lorasmith.records.scoring import TaskEffect


class PlannedSize(Part):
    """What one method makes of a model."""

    method: str
    """`int4 g128`, `gguf q4_k_m`, …"""
    format: str | None
    """The value of `--format` that writes it, with `--bits` where that is needed; None for a method that is
    listed for its size only."""
    embeddings: str
    """`16 bits` where they stay as they are, else the type that they are quantized to."""
    bytes: int
    """Size of all tensors. Tokenizer, configuration and headers come on top: some megabytes."""
    bits_per_weight: float
    """8 · bytes / parameters."""
    fits: bool | None = None
    """Whether `bytes` is within the target; None without a target."""
    fitting_parameters: int | None = None
    """Parameters that the target holds at this method's bits per weight."""


class SizePlan(Record):
    """What `compress --plan` finds from the shapes of the tensors alone."""

    FORMAT: ClassVar[str] = "lorasmith/size-plan/1"

    architecture: str
    parameters: int
    """Number of parameters, tied tensors counted once."""
    embedding_parameters: int
    """Parameters of embedding and output head."""
    tied: bool
    bytes: int
    """Size of the tensors as they are."""
    target_bytes: int | None = None
    target_bits_per_weight: float | None = None
    """What the target leaves for each parameter."""
    reachable: bool | None = None
    """Whether any method reaches the target; None without a target."""
    methods: list[PlannedSize]
    """From the largest to the smallest."""
    smallest: str
    """The method with the fewest bytes."""
    advice: list[str] = []


class TaskQuality(Part):
    """The original (A) against the compressed model (B) on the benchmarks' own questions."""

    overall: TaskEffect
    """Each example by its benchmark's main metric."""
    metrics: list[TaskEffect]
    """Every metric of every benchmark."""
    groups: dict[str, dict[str, TaskEffect]] = {}
    """`source`, `domain`, `difficulty` and their crossings → group → its examples by their main metrics."""
    unscored: int = 0
    """Questions without a verdict on one side or both; they count for neither."""

    @property
    def named(self) -> list[tuple[str, TaskEffect]]:
        """What a table shows: all questions, each benchmark's metrics, each domain and difficulty."""
        rows = [("all questions", self.overall)]
        rows += [(f"{effect.benchmark}, {effect.metric}", effect) for effect in self.metrics]
        for kind in ("domain", "difficulty"):
            rows += [(f"{kind} {name}", effect) for name, effect in self.groups.get(kind, {}).items()]
        return rows


class CompressRecord(Record):
    """`lorasmith_compress.json` in the folder of a compressed model: how it was made and what it lost."""

    FORMAT: ClassVar[str] = "lorasmith/compress/1"

    lorasmith_version: str
    versions: dict[str, str]
    """Versions of auto-round and the libraries that computed with it."""
    model_sha256: str
    """Digest of the model that was compressed."""
    file_format: str
    """`compressed-tensors`, `gguf:q4_0`, …"""
    method: str
    """`rtn` or `calibrated`."""
    bits: int
    group_size: int
    settings: dict[str, Any]
    calibration: FileDigest | None
    """The file whose rows calibrated it; None for round-to-nearest."""
    calibration_samples: int | None = None
    """Samples that the file gave; None for round-to-nearest."""
    parameters: int
    original_bytes: int
    """Size of the weight files before."""
    bytes: int
    """Size of the weight files after."""
    planned_bytes: int
    """What the plan gave for the tensors alone."""
    bits_per_weight: float
    """8 · bytes / parameters."""
    files: list[FileDigest]
    quality: TokenComparison | None = None
    """The original (A) against the compressed model (B), token by token; None where it was not asked for."""
    quality_groups: dict[str, dict[str, TokenComparison]] = {}
    tasks: TaskQuality | None = None
    """The benchmarks' own questions, paired; None where they were not asked."""
    test_set: FileDigest | None = None
    measured_with: dict[str, Any] = {}
    """What the quality depends on beside models and test set: what was measured in the same way is kept."""
    gates: list[GateResult] = []
    passed: bool | None = None
    """Whether all gates passed; None where nothing was measured."""
    findings: list[Finding] = []

    @property
    def kind(self) -> str:
        """The method and its settings in a table's words: `gguf q4_k_m`, `compressed-tensors int4 g64`."""
        if self.file_format.startswith("gguf:"):
            return self.file_format.replace(":", " ")
        return f"{self.file_format} int{self.bits} g{self.group_size}"


class CompressionsRecord(Record):
    """`compressions.json`: one model compressed in several ways, and which of them to take."""

    FORMAT: ClassVar[str] = "lorasmith/compressions/1"

    folders: list[str]
    """The folder of each compressed model, below the record's own."""
    compressed: list[CompressRecord]
    """The record of each compressed model, in the order of `folders`."""
    recommended: str | None
    """Folder of the smallest that passes every gate; None where none does, or nothing was measured."""
    reason: str
