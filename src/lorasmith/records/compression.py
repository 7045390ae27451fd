"""Records of compression: the sizes that are possible, and what a compressed model lost."""

from __future__ import annotations

from typing import Any, ClassVar

from lorasmith.records.base import FileDigest, Finding, Part, Record
from lorasmith.records.proof import TokenComparison
from lorasmith.records.release import GateResult
from lorasmith.records.scoring import ModelIdentity


class PlannedSize(Part):
    """What one method makes of a model."""

    method: str
    """`int4 g128`, `gguf q4_k_m`, …"""
    format: str | None
    """The value of `--format` that writes it; None for a method that is listed for its size only."""
    embeddings: str
    """`16 bits` where they stay as they are, else the type that they are quantized to."""
    bytes: int
    """Of all tensors. Tokenizer, configuration and headers come on top: some megabytes."""
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
    """Tied tensors once."""
    embedding_parameters: int
    """Of embedding and output head."""
    tied: bool
    bytes: int
    """Of the tensors as they are."""
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


class CompressRecord(Record):
    """`lorasmith_compress.json` in the folder of a compressed model: how it was made and what it lost."""

    FORMAT: ClassVar[str] = "lorasmith/compress/1"

    lorasmith_version: str
    versions: dict[str, str]
    """Of auto-round and the libraries that computed with it."""
    model_sha256: str
    """Of the model that was compressed."""
    file_format: str
    """`compressed-tensors`, `gguf:q4_0`, …"""
    method: str
    """`rtn` or `calibrated`."""
    bits: int
    group_size: int
    settings: dict[str, Any]
    calibration: FileDigest | None
    """The file whose rows calibrated it; None for round-to-nearest."""
    parameters: int
    original_bytes: int
    """Of the weight files before."""
    bytes: int
    """Of the weight files after."""
    planned_bytes: int
    """What the plan gave for the tensors alone."""
    bits_per_weight: float
    """8 · bytes / parameters."""
    files: list[FileDigest]
    quality: TokenComparison | None = None
    """The original (A) against the compressed model (B), token by token; None where it was not asked for."""
    quality_groups: dict[str, dict[str, TokenComparison]] = {}
    test_set: FileDigest | None = None
    a: ModelIdentity | None = None
    gates: list[GateResult] = []
    passed: bool | None = None
    """Whether all gates passed; None where nothing was measured."""
    findings: list[Finding] = []
