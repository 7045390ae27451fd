"""Choosing a machine to rent: the provider under caps, and what a command would take on an offer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorasmith.errors import LorasmithError, UsageError

if TYPE_CHECKING:
    from lorasmith.cli.remote_command import RemoteCommand
    from lorasmith.preflight.sizes import ModelSize, WorkSize
    from lorasmith.remote.provider import Offer
    from lorasmith.remote.rental import Renter
    from lorasmith.remote.rented import Estimate

_NO_CAP = 1e9
DEFAULT_HOURS = 0.5
"""Of work, where neither the command nor the person tells: the guide's figure for a 7B model on an H100."""
_GPU_SHARE = 0.5
"""Part of a GPU's stated rate that products reach: a guess, since GPUs were not measured."""
_DISK_BYTES = 500e6
"""Per second to the disk of a rented machine: a guess as well."""


def open_renter(max_price: float, max_cost: float, max_hours: float) -> Renter:
    """The provider with the account's key, under caps."""
    import os

    from lorasmith.remote.caps import Caps
    from lorasmith.remote.rental import Renter
    from lorasmith.remote.vast import URL, Vast
    from lorasmith.remote.vast_http import read_key

    for flag, value in (("--max-price", max_price), ("--max-cost", max_cost), ("--max-hours", max_hours)):
        if not value > 0:
            raise UsageError(f"{flag} {value:g} allows nothing", expected=f"{flag} above 0")
    provider = Vast(read_key(), url=os.environ.get("LORASMITH_VAST_URL", URL))
    return Renter(provider, Caps(max_price, max_cost, max_hours), say=typer.echo)


def looking_renter() -> Renter:
    """For commands that rent nothing."""
    return open_renter(_NO_CAP, _NO_CAP, _NO_CAP)


def choose_offer(renter: Renter, query: str, number: int | None, disk: float) -> Offer:
    """The offer with this number, else the cheapest within the caps; raises `UsageError` for none."""
    known = renter.provider.offers(query, disk)
    require_offers(known, query)
    if number is not None:
        known = [offer for offer in known if offer.id == number]
        require_offers(known, f"offer {number}")
    renter.caps.require(known[0])
    return known[0]


def require_offers(known: list[Offer], query: str) -> None:
    """Raise `UsageError` where nothing is offered."""
    if not known:
        raise UsageError(
            "nothing is offered under these conditions",
            where=query or "vast.ai",
            remedy="ask for less: another GPU, fewer of them, less disk, a lower reliability",
        )


@dataclass(frozen=True)
class Need:
    """What a command needs of a rented machine."""

    sent_gb: float
    fetched_gb: float
    disk: float
    """GB: environment, inputs, and results of twice their size."""
    hours: float | None = None
    """Of work as the person says; None to work it out for each offer."""
    sizes: tuple[ModelSize, WorkSize] | None = None
    """Of a run whose models and test set are here."""

    def work_hours(self, offer: Offer) -> float:
        """As the person says, else by the formulas of `lorasmith doctor`, else half an hour."""
        if self.hours is not None:
            return self.hours
        if self.sizes is None or not offer.flops:
            return DEFAULT_HOURS
        from lorasmith.preflight.estimate import Rates, estimate

        rates = Rates(flops=_GPU_SHARE * offer.flops, write_bytes=_DISK_BYTES)
        return sum(stage.seconds for stage in estimate(*self.sizes, rates)) / 3600

    def estimate(self, offer: Offer) -> Estimate:
        """Hours and dollars on this offer, set-up and traffic included."""
        from lorasmith.remote.rented import estimate

        return estimate(offer, self.work_hours(offer), self.sent_gb, self.fetched_gb)

    @property
    def basis(self) -> str:
        """Where the hours come from."""
        if self.hours is not None:
            return f"{self.hours:g} h of work"
        if self.sizes is not None:
            return (
                f"work estimated from {self.sizes[1].tokens:,} tokens and {_GPU_SHARE:.0%} of each GPU's rate"
            )
        return f"{DEFAULT_HOURS:g} h of work assumed (--hours)"


def needs(found: RemoteCommand | None, hours: float | None, disk: float | None) -> Need:
    """What the command sends and fetches, and how much it has to do. Models of the hub count 20 GB each."""
    from lorasmith.remote.rented import size_gb

    sent = size_gb(found.inputs) if found else 0.0
    hub = 20.0 * len(found.hub) if found else 0.0
    space = disk or 25.0 + 3 * (sent + hub)
    sizes = _sizes(found.values) if found and found.name == "run" and not found.hub else None
    return Need(sent, 2 * sent, space, hours, sizes)


def _sizes(values: dict[str, Any]) -> tuple[ModelSize, WorkSize] | None:
    """Of a run; None where its files cannot be read: the run itself will say what is wrong with them."""
    from lorasmith.checkpoint.adapter import open_adapter
    from lorasmith.checkpoint.model import open_checkpoint
    from lorasmith.files.jsonl import read_examples
    from lorasmith.preflight.sizes import model_size, work_size

    try:
        base = open_checkpoint(Path(values["base"]))
        adapter = open_adapter(Path(values["adapter"]))
        rows = read_examples(Path(values["test_set"]))
    except (LorasmithError, TypeError):
        return None
    return model_size(base, adapter, base.total_bytes), work_size(rows, base.folder)
