"""What runs cost: by phase, in all, against plan and budget."""

from __future__ import annotations

from typing import ClassVar

from lorasmith.records.base import Part, Record


class PhaseCost(Part):
    """One stage of one run, as it last really ran; or what was paid for besides."""

    run: str
    """Name of the run folder."""
    phase: str
    wall_seconds: float
    cpu_seconds: float | None = None
    gpu_seconds: float | None = None
    """None where no GPU tells: then the processor was the device, or nothing is known."""
    joules: float | None = None
    """Energy of all devices that tell; None for not measured."""
    peak_rss_bytes: int | None = None
    worker_peak_rss_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    dollars: float | None
    """None where no price is known."""

    @property
    def device_seconds(self) -> float | None:
        """Of the GPUs where they tell, else of the processors."""
        return self.cpu_seconds if self.gpu_seconds is None else self.gpu_seconds


class RentalCost(Part):
    """What one rented machine cost, from offer to end."""

    label: str
    instance: int | None
    hours: float
    compute: float
    disk: float
    traffic: float
    """US dollars; their sum is `dollars`."""
    dollars: float
    planned: float | None
    """As estimated before it was rented."""


class CostRecord(Record):
    """The answer of `lorasmith costs`."""

    FORMAT: ClassVar[str] = "lorasmith/costs/1"

    phases: list[PhaseCost]
    rentals: list[RentalCost] = []
    """Their dollars are in the phases already."""
    wall_seconds: float
    joules: float | None = None
    """Of all phases that were measured; None where none was."""
    dollars: float | None
    """The grand total; None unless the price of every phase is known."""
    planned: float | None
    """US dollars that were planned: as given, else as estimated before the machines were rented."""
    budget: float | None
    """US dollars that may be spent: as given, else as the runs were given."""
    within_budget: bool | None
    """None without a budget or without a total."""
