"""`lorasmith remote offers | up | down | list | reap`: machines for rent on Vast.ai."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.errors import UsageError

if TYPE_CHECKING:
    from lorasmith.cli.remote_command import RemoteCommand
    from lorasmith.remote.provider import Offer
    from lorasmith.remote.rental import Renter

Query = Annotated[str, typer.Option(help='Conditions on offers: "gpu_name=H100_SXM num_gpus=1".')]
MaxPrice = Annotated[float, typer.Option(help="US dollars an hour at most.")]
MaxCost = Annotated[float, typer.Option(help="US dollars in all at most; the machine is destroyed at it.")]
MaxHours = Annotated[float, typer.Option(help="Hours at most; the machine is destroyed at them.")]
Disk = Annotated[float | None, typer.Option(help="GB of disk. [what the command needs]")]
Hours = Annotated[float, typer.Option(help="How long the work itself will take, for the estimate.")]
Image = Annotated[str | None, typer.Option(help="Docker image. [the provider's own]")]


def offers(
    command: Annotated[
        list[str] | None, typer.Argument(help="After --: the command, so that its data is counted.")
    ] = None,
    query: Query = "",
    hours: Hours = 0.5,
    disk: Disk = None,
    limit: Annotated[int, typer.Option(help="Offers to show.")] = 15,
) -> None:
    """Offers of Vast.ai, with what this run would cost on each, traffic included.

    Example: `lorasmith remote offers --query "gpu_name=H100_SXM" --hours 0.5`
    """
    from lorasmith.cli.console import console, table
    from lorasmith.cli.remote_command import read_command
    from lorasmith.remote.rented import estimate

    found = read_command(command) if command else None
    sent, fetched, needed = transfer_sizes(found)
    renter = open_renter(1e9, 1e9, 1e9)
    space = disk or needed
    known = renter.provider.offers(query, space)[:limit]
    require_offers(known, query)
    rows = []
    for offer in known:
        cost = estimate(offer, hours, sent, fetched)
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
    title = f"{hours:g} h of work, {sent:.1f} GB there, {fetched:.1f} GB back, {space:.0f} GB of disk"
    console().print(table(title, columns, rows))


def up(
    max_cost: MaxCost,
    query: Query = "",
    offer: Annotated[int | None, typer.Option(help="Number of the offer. [the cheapest]")] = None,
    max_price: MaxPrice = 4.0,
    max_hours: MaxHours = 6.0,
    disk: Disk = None,
    image: Image = None,
) -> None:
    """Rent a machine and say how to reach it; it destroys itself at the caps, or after 30 idle minutes.

    Example: `lorasmith remote up --query "gpu_name=RTX_4090" --max-cost 2`
    """
    from lorasmith.remote.rental import IMAGE
    from lorasmith.remote.rented import open_transport, own_key

    renter = open_renter(max_price, max_cost, max_hours)
    space = disk or 60.0
    chosen = choose_offer(renter, query, offer, space)
    rental = renter.rent(chosen, disk=space, image=image or IMAGE)
    try:
        found = renter.wait_until_running(rental)
        transport = open_transport(renter, rental, found)
    except BaseException:
        renter.give_back(rental)
        raise
    typer.echo(f"{rental.label}: instance {found.id} runs, ${rental.price_per_hour:.3f} an hour")
    known = f"-o UserKnownHostsFile={transport.known_hosts}"
    typer.echo(f"  ssh -i {own_key()} {known} -p {found.port} root@{found.host}")
    typer.echo(f"  give it back with: lorasmith remote down {rental.label}")


def down(
    name: Annotated[str, typer.Argument(help="Label or number of the instance.")],
) -> None:
    """Destroy a rented machine, and confirm that it is gone.

    Example: `lorasmith remote down lorasmith-0a1b2c3d4e5f`
    """
    from lorasmith.remote.rental import open_rentals

    found = [rental for rental in open_rentals() if name in (rental.label, str(rental.instance))]
    if not found:
        known = ", ".join(rental.label for rental in open_rentals()) or "none"
        raise UsageError(f"this computer rents nothing called {name!r}", expected=f"one of: {known}")
    gone = open_renter(found[0].max_price, found[0].max_cost, found[0].max_hours).give_back(found[0])
    typer.echo(f"{gone.label}: {gone.state}")


def list_() -> None:
    """All instances of the account, and which of them lorasmith rented.

    Example: `lorasmith remote list`
    """
    from lorasmith.cli.console import console, table
    from lorasmith.remote.rental import PREFIX

    found = open_renter(1e9, 1e9, 1e9).provider.instances()
    rows = [
        (
            str(one.id),
            one.label,
            one.status,
            f"${one.price_per_hour:.3f}",
            f"{one.host}:{one.port}" if one.host else "",
            "lorasmith" if one.label.startswith(PREFIX) else "",
        )
        for one in found
    ]
    console().print(table(f"{len(found)} instances", ("id", "label", "state", "per hour", "ssh", "by"), rows))


def reap(
    everything: Annotated[
        bool, typer.Option("--all", help="Also what lorasmith rented from other computers.")
    ] = False,
) -> None:
    """Destroy every machine that lorasmith rented and that is not known to be gone.

    Example: `lorasmith remote reap`
    """
    found = open_renter(1e9, 1e9, 1e9).reap(everything=everything)
    for rental in found:
        what = "gone" if rental.state == "gone" else "not seen; its watchdog ends it, ask again later"
        typer.echo(f"{rental.label}: {what}")
    typer.echo(f"{len(found)} looked after" if found else "nothing is rented")


def open_renter(max_price: float, max_cost: float, max_hours: float) -> Renter:
    """The provider with the account's key, under caps."""
    import os

    from lorasmith.remote.rental import Caps, Renter
    from lorasmith.remote.vast import URL, Vast, read_key

    for flag, value in (("--max-price", max_price), ("--max-cost", max_cost), ("--max-hours", max_hours)):
        if not value > 0:
            raise UsageError(f"{flag} {value:g} allows nothing", expected=f"{flag} above 0")
    url = os.environ.get("LORASMITH_VAST_URL", URL)
    provider = Vast(read_key(), url=url)
    return Renter(provider, Caps(max_price, max_cost, max_hours), say=typer.echo, url=url)


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


def transfer_sizes(found: RemoteCommand | None) -> tuple[float, float, float]:
    """GB there, GB back, and GB of disk: a run leaves a merged model and its archive, twice its inputs."""
    from lorasmith.remote.rented import size_gb

    sent = size_gb(found.inputs) if found else 0.0
    hub = 20.0 * len(found.hub) if found else 0.0
    return sent, 2 * sent, 25.0 + 3 * (sent + hub)


for _command in (offers, list_, reap):
    _command.works_without_arguments = True  # type: ignore[attr-defined]
