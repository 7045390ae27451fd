"""What a machine may cost that is rented, and what it must have."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from lorasmith.options.base import Flag, Options

Above = Annotated[float, Field(gt=0)]


class CapOptions(Options):
    """Caps at which a rented machine is destroyed."""

    PANEL: ClassVar[str] = "Renting"

    max_cost: Annotated[Above | None, Flag(default="needed to rent")] = None
    """Largest cost in all, in US dollars; the machine is destroyed at it."""
    max_price: Above = 4.0
    """Highest price of the machine, in US dollars an hour."""
    max_hours: Above = 6.0
    """Longest time in hours; the machine is destroyed at it."""


class DiskOptions(Options):
    """Room on the machine."""

    PANEL: ClassVar[str] = "Renting"

    disk: Annotated[Above | None, Flag(default="what the command needs")] = None
    """Size of the disk in GB."""


class HoursOptions(Options):
    """How long the work takes."""

    PANEL: ClassVar[str] = "Renting"

    hours: Annotated[Above | None, Flag(default="worked out from a run's sizes")] = None
    """Time of the work itself in hours, for the estimate."""


class QueryOptions(Options):
    """Which machines are looked at."""

    PANEL: ClassVar[str] = "Renting"

    query: Annotated[str, Flag(metavar="CONDITIONS", default="none")] = ""
    """Conditions on offers, such as "gpu_name=H100_SXM num_gpus=1"."""


class MachineOptions(CapOptions, DiskOptions):
    """Which machine is rented."""

    PANEL: ClassVar[str] = "Renting"

    offer: Annotated[int | None, Flag(default="the cheapest")] = None
    """Number of the offer that is taken."""
    image: Annotated[str | None, Flag(default="the provider's own")] = None
    """Docker image of the machine."""
