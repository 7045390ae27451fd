"""Record of a check before a run: what was looked at, and what the run would take."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from lorasmith.records.base import Part, Record


class Check(Part):
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "note", "warning", "error"]
    """`error`: a run would fail; `warning`: it may; `note`: worth knowing."""
    found: str
    remedy: str = ""


class StageEstimate(Part):
    """What one stage would take."""

    stage: str
    seconds: float
    memory_bytes: int
    """Peak while it runs."""
    disk_bytes: int
    """What it leaves behind, at most."""


class DoctorRecord(Record):
    """What `lorasmith doctor --json` prints."""

    FORMAT: ClassVar[str] = "lorasmith/doctor/1"

    machine: dict[str, Any]
    checks: list[Check]
    rates: dict[str, float] = {}
    """Measured: `flops` and `write_bytes` per second."""
    stages: list[StageEstimate] = []
    """Empty where model or test set are unknown."""
    seconds: float | None = None
    memory_bytes: int | None = None
    """The largest peak of all stages."""
    disk_bytes: int | None = None
    """All that the run folder will hold, at most."""
    price_per_hour: float | None = None
    dollars: float | None = None
