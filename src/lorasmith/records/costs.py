"""What runs cost: by phase, in all, against plan and budget."""

from __future__ import annotations

from typing import ClassVar

from lorasmith.records.base import Part, Record


class PhaseCost(Part):
    """One stage of one run, as it last really ran; or its attempts that did not come to an end."""

    run: str
    """Name of the run folder."""
    phase: str
    wall_seconds: float
    cpu_seconds: float | None
    peak_rss_bytes: int | None
    dollars: float | None
    """None where no price is known."""


class CostRecord(Record):
    """The answer of `lorasmith costs`."""

    FORMAT: ClassVar[str] = "lorasmith/costs/1"

    phases: list[PhaseCost]
    wall_seconds: float
    dollars: float | None
    """The grand total; None unless the price of every phase is known."""
    planned: float | None
    """US dollars that were planned."""
    budget: float | None
    within_budget: bool | None
    """None without a budget or without a total."""
    currency: str = "USD"
