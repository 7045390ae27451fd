"""`lorasmith remote offers | up | down | list | reap`: machines for rent on Vast.ai."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import say
from lorasmith.errors import LorasmithError, UsageError

if TYPE_CHECKING:
    from lorasmith.cli.remote.command import RemoteCommand
    from lorasmith.options import CapOptions, DiskOptions, HoursOptions, MachineOptions, QueryOptions
    from lorasmith.preflight.sizes import ModelSize, WorkSize
    from lorasmith.records.remote import Rental
    from lorasmith.remote.rental.job import Estimate
    from lorasmith.remote.rental.provider import Charge, Offer
    from lorasmith.remote.rental.rent import Renter


# Choosing a machine to rent: the provider under caps, and what a command would take on an offer.


_NO_CAP = 1e9
DEFAULT_HOURS = 0.5
"""Hours of work where neither command nor person tells: the guide's figure for a 7B model on an H100."""
_GPU_SHARE = 0.5
"""Part of a GPU's stated rate that products reach: a guess, since GPUs were not measured."""
_DISK_BYTES = 500e6
"""Per second to the disk of a rented machine: a guess as well."""


def looking_renter() -> Renter:
    """The provider, for commands that rent nothing."""
    from lorasmith.remote.rental.rent import open_renter

    return open_renter(_NO_CAP, _NO_CAP, _NO_CAP, say)


def largest_cost(caps: CapOptions) -> float:
    """What renting may cost; raises `UsageError` where nobody has said."""
    if caps.max_cost is None:
        raise UsageError("renting spends money", expected="--max-cost, in US dollars")
    return caps.max_cost


def choose_offer(renter: Renter, query: str, number: int | None, disk: float) -> Offer:
    """The offer with this number, else the cheapest within the caps; raises `UsageError` for none."""
    from lorasmith.remote.rental.rent import require_price

    known = renter.provider.offers(query, disk)
    require_offers(known, query)
    if number is not None:
        known = [offer for offer in known if offer.id == number]
        require_offers(known, f"offer {number}")
    require_price(known[0], renter.caps)
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
    """Hours of work as the person says; None to work them out for each offer."""
    sizes: tuple[ModelSize, WorkSize] | None = None
    """Sizes of a run whose models and test set are here."""

    def work_hours(self, offer: Offer) -> float:
        """Hours as the person says, else by the formulas of `lorasmith doctor`, else half an hour."""
        if self.hours is not None:
            return self.hours
        if self.sizes is None or not offer.flops:
            return DEFAULT_HOURS
        from lorasmith.preflight.estimate import Rates, estimate

        rates = Rates(flops=_GPU_SHARE * offer.flops, write_bytes=_DISK_BYTES)
        return sum(stage.seconds for stage in estimate(*self.sizes, rates)) / 3600

    def estimate(self, offer: Offer) -> Estimate:
        """Hours and dollars on this offer, set-up and traffic included."""
        from lorasmith.remote.rental.job import estimate

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


def needs(command: RemoteCommand | None, hours: float | None, disk: float | None) -> Need:
    """What the command sends and fetches, and how much it has to do. Models of the hub count 20 GB each."""
    from lorasmith.remote.rental.job import size_gb

    sent = size_gb(command.inputs) if command else 0.0
    hub = 20.0 * len(command.hub) if command else 0.0
    space = disk or 25.0 + 3 * (sent + hub)
    sizes = _sizes(command.values) if command and command.name == "run" and not command.hub else None
    return Need(sent, 2 * sent, space, hours, sizes)


def _sizes(values: dict[str, Any]) -> tuple[ModelSize, WorkSize] | None:
    """Sizes of a run; None where its files cannot be read: the run itself says what is wrong with them."""
    from lorasmith.checkpoint.adapter import open_adapter
    from lorasmith.data.rows import read_examples
    from lorasmith.preflight.sizes import model_size, plain_bytes, work_size
    from lorasmith.quantized.open import open_base

    try:
        base = open_base(Path(values["base"]))
        adapter = open_adapter(Path(values["adapter"]))
        rows = read_examples(Path(values["test_set"]))
    except (LorasmithError, TypeError):
        return None
    return model_size(base, adapter, plain_bytes(base)), work_size(rows, base.folder)


def offers(
    command: Annotated[
        list[str] | None, typer.Argument(help="After --: the command, so that its data is counted.")
    ] = None,
    *,
    query: QueryOptions,
    work: HoursOptions,
    room: DiskOptions,
    limit: Annotated[int, typer.Option(help="Number of offers to show.")] = 15,
) -> None:
    """Offers of Vast.ai, with what this run would cost on each: set-up, work, disk and traffic.

    Example: `lorasmith remote offers --query "gpu_name=H100_SXM" --hours 0.5`
    """
    from lorasmith.cli.console import console, table
    from lorasmith.cli.remote.command import read_command

    need = needs(read_command(command) if command else None, work.hours, room.disk)
    known = looking_renter().provider.offers(query.query, need.disk)[:limit]
    require_offers(known, query.query)
    rows = []
    for offer in known:
        cost = need.estimate(offer)
        rows.append(
            (
                str(offer.id),
                f"{offer.gpus} × {offer.gpu}",
                f"{offer.gpu_memory / 1e9:.0f} GB",
                f"${offer.price_per_hour:.3f}",
                f"{offer.reliability:.1%}",
                f"{offer.disk:.0f} GB",
                f"{offer.download:,.0f}/{offer.upload:,.0f}",
                offer.place,
                f"{cost.hours:.2f} h",
                f"${cost.dollars:.2f}",
            )
        )
    machine = ("offer", "GPU", "memory", "per hour", "reliability", "disk", "Mbit/s ↓/↑", "place")
    columns = (*machine, "time", "cost")
    copied = f"{need.sent_gb:.1f} GB there, {need.fetched_gb:.1f} GB back"
    title = f"{need.basis}, {copied}, {need.disk:.0f} GB of disk"
    console().print(table(title, columns, rows))


def up(
    query: QueryOptions,
    machine: MachineOptions,
) -> None:
    """Rent a machine and say how to reach it; it destroys itself at the caps, or after 30 idle minutes.

    Example: `lorasmith remote up --query "gpu_name=RTX_4090" --max-cost 2`
    """
    from lorasmith.remote.rental.first_contact import open_transport, own_key
    from lorasmith.remote.rental.rent import IMAGE, open_renter

    renter = open_renter(machine.max_price, largest_cost(machine), machine.max_hours, say)
    space = machine.disk or 60.0
    chosen = choose_offer(renter, query.query, machine.offer, space)
    with renter.rented(chosen, keep=True, disk=space, image=machine.image or IMAGE) as rental:
        instance = renter.wait_until_running(rental)
        transport = open_transport(renter, rental, instance)
    say(f"{rental.label}: instance {instance.id} runs, ${rental.price_per_hour:.3f} an hour")
    known = f"-o UserKnownHostsFile={transport.known_hosts}"
    say(f"  ssh -i {own_key()} {known} -p {instance.port} root@{instance.host}")
    say(f"  lorasmith remote run --host root@{instance.host}:{instance.port} -- COMMAND")
    say(f"  give it back with: lorasmith remote down {rental.label}")


def down(
    name: Annotated[str, typer.Argument(help="Label or number of the instance.")],
) -> None:
    """Destroy a rented machine, and confirm that it is gone.

    Example: `lorasmith remote down lorasmith-0a1b2c3d4e5f`
    """
    from pathlib import Path

    from lorasmith.remote.rental.job import record_rentals
    from lorasmith.remote.state import open_rentals

    named = [rental for rental in open_rentals() if name in (rental.label, str(rental.instance))]
    if not named:
        known = ", ".join(rental.label for rental in open_rentals()) or "none"
        raise UsageError(
            f"this computer rents nothing called {name!r}",
            expected=f"one of: {known}",
            remedy="`lorasmith remote reap` also ends what no record here can be read of",
        )
    gone = looking_renter().give_back(named[0])
    for place in gone.outputs:
        record_rentals(Path(place))
    say(f"{gone.label}: {gone.state}, {_spent(gone)}")


def list_(
    past: Annotated[
        bool, typer.Option("--past", help="What this computer rented before, computed and billed.")
    ] = False,
) -> None:
    """All instances of the account, and which of them lorasmith rented.

    With --past: rentals that have ended, what they cost by lorasmith's count, and what the provider billed.

    Example: `lorasmith remote list`
    """
    from lorasmith.cli.console import console, table
    from lorasmith.remote.state import PREFIX

    provider = looking_renter().provider
    if past:
        console().print(table("Rentals that have ended", *_past(provider.charges)))
        return
    instances = provider.instances()
    rows = [
        (
            "?" if one.id is None else str(one.id),
            one.label,
            one.status,
            "?" if one.price_per_hour is None else f"${one.price_per_hour:.3f}",
            f"{one.host}:{one.port}" if one.host else "",
            "lorasmith" if one.label.startswith(PREFIX) else "",
        )
        for one in instances
    ]
    columns = ("id", "label", "state", "per hour", "ssh", "by")
    console().print(table(f"{len(instances)} instances", columns, rows))


def _past(
    charges: Callable[[float, float], dict[int, Charge]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    from lorasmith.files.costs import rental_cost
    from lorasmith.remote.state import rentals

    ended = [one for one in rentals() if one.state == "gone" and one.gone_at is not None]
    billed: dict[int, Charge] = {}
    if ended:
        billed = charges(min(one.asked_at for one in ended), max(one.gone_at or 0.0 for one in ended))
    rows: list[tuple[str, ...]] = []
    for rental in sorted(ended, key=lambda one: one.asked_at):
        cost = rental_cost(rental)
        charge = billed.get(rental.instance) if rental.instance is not None else None
        bill = None if charge is None else charge.dollars
        rows.append(
            (
                rental.label,
                str(rental.instance or "–"),
                f"{cost.hours:.2f} h",
                f"${cost.compute + cost.disk:.3f}",
                f"${cost.traffic:.3f}",
                f"${cost.dollars:.3f}",
                "not billed yet" if bill is None else f"${bill:.3f}",
                "" if bill is None else f"${bill - cost.dollars:+.3f}",
            )
        )
    columns = ("label", "id", "time", "machine", "traffic", "computed", "billed", "difference")
    return columns, rows


def reap(
    everything: Annotated[
        bool, typer.Option("--all", help="Destroy what lorasmith rented from other computers as well.")
    ] = False,
) -> None:
    """Destroy every machine that lorasmith rented and that is not known to be gone.

    Exit code 1 where one of them may still run; its label and number are then shown.

    Example: `lorasmith remote reap`
    """
    outcomes = looking_renter().reap(everything=everything)
    for outcome in outcomes:
        say(outcome.line)
    say(f"{len(outcomes)} looked after" if outcomes else "nothing is rented")
    if any(outcome.state != "gone" for outcome in outcomes):
        raise typer.Exit(1)


def _spent(rental: Rental) -> str:
    from lorasmith.files.costs import rental_cost

    cost = rental_cost(rental)
    return f"{cost.hours:.2f} h, ${cost.dollars:.2f}, ${cost.traffic:.2f} of it for traffic"


_BARE: tuple[Any, ...] = (offers, list_, reap)
for _command in _BARE:
    _command.works_without_arguments = True
