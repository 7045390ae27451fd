"""`lorasmith remote run | attach | status | logs | fetch | stop`: any command on any machine by ssh."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson
from lorasmith.cli.remote_offer import choose_offer, needs, open_renter
from lorasmith.cli.remote_rent import Disk, Hours, Image, MaxHours, MaxPrice
from lorasmith.cli.remote_session import ended, follow, new_session, open_job, open_session, report_again
from lorasmith.errors import UsageError

if TYPE_CHECKING:
    from lorasmith.records.remote import RemoteJob

Identity = Annotated[
    Path | None, typer.Option(help="Private key for ssh. [ssh's own choice]", metavar="FILE")
]
Fingerprint = Annotated[
    str | None, typer.Option(help="SHA256:… of the machine's host key, for the first contact.")
]
JobName = Annotated[str | None, typer.Argument(help="Id of the job, or its beginning. [the newest]")]


def run(
    command: Annotated[list[str], typer.Argument(help="After --: any lorasmith command with local paths.")],
    host: Annotated[str | None, typer.Option(help="user@host or user@host:port.")] = None,
    vast: Annotated[
        str | None,
        typer.Option(help='Rent a machine for it: conditions such as "gpu_name=H100_SXM num_gpus=1".'),
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="With --vast: US dollars in all at most; needed.")
    ] = None,
    max_price: MaxPrice = 4.0,
    max_hours: MaxHours = 6.0,
    offer: Annotated[
        int | None, typer.Option(help="With --vast: number of the offer. [the cheapest]")
    ] = None,
    hours: Hours = None,
    disk: Disk = None,
    image: Image = None,
    identity: Identity = None,
    fingerprint: Fingerprint = None,
    folder: Annotated[str, typer.Option(help="lorasmith's folder there.")] = "~/.lorasmith",
    remote_python: Annotated[
        str | None,
        typer.Option(help="An interpreter there with lorasmith's dependencies, instead of installing them."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="Name of a variable to pass on, such as HF_TOKEN; its value is never written."),
    ] = None,
) -> None:
    """Run a command on another machine: upload, run detached, fetch, and verify every result.

    Lost connections are opened again. Given again after an interruption, the same command goes on where it
    was. A model given as hub:organisation/name[@revision] is fetched from the hub there. With --vast a
    machine is rented, and destroyed in every ending. The exit code is that of the command.

    Example: `lorasmith remote run --host root@1.2.3.4:40022 -- run --base base --adapter adapter
    --test-set test.jsonl --output run`
    """
    from lorasmith.cli.remote_command import read_command
    from lorasmith.remote.job import make_job, require_free_outputs, require_inputs
    from lorasmith.remote.rental import IMAGE
    from lorasmith.remote.rented import remember_outputs, run_rented
    from lorasmith.remote.session import value_of
    from lorasmith.remote.ssh import parse_host
    from lorasmith.remote.state import rental_at
    from lorasmith.remote.welcome import own_key

    if (host is None) == (vast is None):
        raise UsageError("where should it run?", expected="either --host user@machine or --vast CONDITIONS")
    found = read_command(command)

    def make(login: str, port: int | None, key: str | None, price: float | None) -> RemoteJob:
        return make_job(
            login,
            port,
            found.at_price(price),
            found.inputs,
            found.outputs,
            folder=folder,
            identity=key,
            hub=found.hub,
            extras=found.extras,
            python=remote_python,
            environment=env or [],
        )

    if host is not None:
        place = parse_host(host)
        rental = rental_at(place.name, place.port)
        key = identity or (own_key() if rental else None)
        price = rental.price_per_hour if rental else None
        job = make(place.login, place.port, str(key.absolute()) if key else None, price)
        if rental:
            remember_outputs(rental.label, job)
        ended(follow(open_session(job, fingerprint), rental, needs_gpu=found.needs_gpu))
    if max_cost is None:
        raise UsageError("--vast spends money", expected="--max-cost, in US dollars")
    # What would fail there in a quarter of an hour fails here, before money is spent.
    require_inputs(found.inputs)
    require_free_outputs(found.outputs)
    for name in env or []:
        value_of(name)
    need = needs(found, hours, disk)
    renter = open_renter(max_price, max_cost, max_hours)
    chosen = choose_offer(renter, str(vast), offer, need.disk)
    status = run_rented(
        renter,
        chosen,
        partial(make, price=chosen.price_per_hour),
        new_session,
        disk=need.disk,
        image=image or IMAGE,
        needs_gpu=found.needs_gpu,
        planned=need.estimate(chosen).dollars,
        outputs=[item.local for item in found.outputs],
    )
    report_again(found)
    ended(status)


def attach(job: JobName = None) -> None:
    """Follow a job that runs on another machine, then fetch and verify its results.

    Example: `lorasmith remote attach`
    """
    session = open_job(job)
    ended(session.finish(session.attach()))


def status(job: JobName = None, as_json: AsJson = False) -> None:
    """Where a job on another machine stands.

    Example: `lorasmith remote status`
    """
    from lorasmith.cli.console import console

    session = open_job(job)
    found = session.status()
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    screen = console()
    code = "" if found.code is None else f", exit code {found.code}"
    reason = f" ({found.reason})" if found.reason else ""
    seconds = "" if found.seconds is None else f", {found.seconds:,.0f} s"
    screen.print(f"{session.job.id} on {session.transport.where}: {found.phase}{code}{seconds}{reason}")
    screen.print(f"  lorasmith {' '.join(session.job.command)}", markup=False, soft_wrap=True)
    if session.job.fetched:
        screen.print("  results are here and verified")


def logs(job: JobName = None) -> None:
    """Print what a job has written so far, and follow it while it runs.

    Example: `lorasmith remote logs`
    """
    open_job(job).attach()


def fetch(job: JobName = None) -> None:
    """Fetch the results of a job that has ended, and verify every SHA-256.

    Example: `lorasmith remote fetch`
    """
    session = open_job(job)
    ended(session.finish(session.status()))


def stop(job: JobName = None) -> None:
    """Stop a job as Ctrl-C would; `remote run` with the same command goes on with it.

    Example: `lorasmith remote stop`
    """
    found = open_job(job).stop()
    typer.echo(f"{found.phase}" + (f": {found.reason}" if found.reason else ""))


for _command in (attach, status, logs, fetch, stop):
    _command.works_without_arguments = True  # type: ignore[attr-defined]
