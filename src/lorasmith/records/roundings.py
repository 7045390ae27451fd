"""Record of a comparison of roundings."""

from __future__ import annotations

from typing import ClassVar

from lorasmith.records.base import FileDigest, Finding, Interval, Part, Record
from lorasmith.records.proof import KLStatistics


class Range16(Part):
    """How the weights of a model lie in float16's range."""

    numbers: int
    subnormal: int
    """Weights below 2⁻¹⁴ in size, which keep fewer than 11 bits; some processors take them for zero."""
    largest: float
    """Of 65,504."""


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
    """Of the behaviour proof."""
    float16: Range16 | None = None


class RoundingsRecord(Record):
    """`roundings.json`: every mode against the adapter on the same rows, float32 arithmetic."""

    FORMAT: ClassVar[str] = "lorasmith/roundings/1"

    test_set: FileDigest
    modes: list[RoundingFound]
    recommended: str
    reason: str
    """With the numbers that decided it."""
    findings: list[Finding] = []
