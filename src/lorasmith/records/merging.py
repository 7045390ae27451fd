"""Records of a merge: what became of every tensor."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from lorasmith.records.base import FileDigest, Finding, Interval, Part, Record
from lorasmith.records.proof import KLStatistics


class MergedTensor(Part):
    """One tensor of the merged model that an adapter changed."""

    name: str
    formula: str
    """The formula in words, such as `W + s·B·A`."""
    adapter_tensors: list[str]
    scale: float | None = None
    shape: list[int]
    dtype_base: str
    dtype_merged: str
    elements: int
    changed: int
    """Elements whose stored value differs from the base's (after the cast to the merged type)."""
    swallowed: int
    """Elements with a non-zero update that rounding took back to the base's value.

    An update counts as non-zero if one of its products is; with DoRA every element has one.
    """
    rounding: str = "nearest"
    """`nearest`, `dithered` or `calibrated`; what is replaced as a whole is rounded to nearest."""
    fallback: str = ""
    """Why a calibrated merge only dithered this tensor."""
    exact_redone: int = 0
    """Elements exactly halfway between two neighbours, which only exact arithmetic can tell."""
    underflowed: int = 0
    """Elements below the smallest normal number of their type where the base's value was not."""
    relative_update: float = 0.0
    """‖ΔW‖₂ / ‖W‖₂ to four digits, so that the order of the sums does not show; 0 for replaced tensors."""


class CalibrationUse(Part):
    """What a calibrated merge was fitted to."""

    files: list[FileDigest]
    rows: int
    tokens: int
    left_out: int = 0
    """Rows that are in the test set."""
    test_set_checked: bool
    """Whether the rows were compared with a test set."""


class MergeRecord(Record):
    """`lorasmith_merge.json` in the merged folder."""

    FORMAT: ClassVar[str] = "lorasmith/merge/1"

    lorasmith_version: str
    base_repository: str | None = None
    """`org/name` where the base was taken from the Hugging Face hub's cache."""
    base_commit: str | None = None
    """Its commit."""
    base_sha256: str
    adapter_sha256: list[str]
    adapter_weights: list[float]
    precision: str
    """`base` (each tensor's own type), `float32`, `bfloat16` or `float16`."""
    into: str = Field(default="", exclude_if=lambda into: not into)
    """What a quantized base was merged into: `16bit` or `base`; empty for a base that is not quantized."""
    rounding: str
    """`nearest`, `dithered` or `calibrated`."""
    seed: int | None = None
    calibration: CalibrationUse | None = None
    tensors: list[MergedTensor]
    copied: int
    """Tensors taken over byte for byte."""
    cast: int
    """Tensors that only changed their precision."""
    elements_updated: int
    """Elements with a non-zero update."""
    elements_swallowed: int
    swallowed_fraction: float
    """elements_swallowed / elements_updated."""
    untied: bool = False
    files: list[FileDigest]
    """Everything in the merged folder but this record."""
    findings: list[Finding] = []
    direct_io: bool = Field(default=True, exclude=True)
    """Whether all shards went past the page cache; of this machine, hence not in the file."""

    @property
    def base_warnings(self) -> list[Finding]:
        """Warnings that the base is not the one the adapter names; report and terminal show them first."""
        return [one for one in self.findings if one.severity == "warning" and one.code.startswith("base-")]


# Record of a comparison of roundings.


class Range16(Part):
    """How the weights of a model lie in float16's range."""

    numbers: int
    subnormal: int
    """Weights below 2⁻¹⁴ in size, which keep fewer than 11 bits; some processors take them for zero."""
    largest: float
    """The largest absolute weight; float16 reaches to 65,504."""


class RoundingFound(Part):
    """What one way of rounding gave."""

    name: str
    precision: str
    rounding: str
    bytes: int
    swallowed_fraction: float
    """Elements with an update that hold the base's value."""
    loss_delta: float
    loss_delta_interval: Interval | None
    kl: KLStatistics
    top1_agreement: float
    grade: str
    """The grade of the behaviour proof."""
    float16: Range16 | None = None
    recovery: float | None = None
    """The share of the adapter's gain in loss over its base that is left; of merges into a quantized base."""


class RoundingsRecord(Record):
    """`roundings.json`: every mode against the adapter on the same rows, float32 arithmetic."""

    FORMAT: ClassVar[str] = "lorasmith/roundings/1"

    test_set: FileDigest
    modes: list[RoundingFound]
    recommended: str
    reason: str
    """With the numbers that decided it."""
    findings: list[Finding] = []
