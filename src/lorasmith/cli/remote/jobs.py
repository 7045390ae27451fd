"""`lorasmith remote run | attach | status | logs | fetch | stop`: any command on any machine by ssh."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import say
from lorasmith.cli.options import AsJson
from lorasmith.cli.remote.rentals import (
    choose_offer,
    largest_cost,
    needs,
)
from lorasmith.errors import UsageError

if TYPE_CHECKING:
    from lorasmith.cli.remote.command import RemoteCommand
    from lorasmith.options import HoursOptions, MachineOptions
    from lorasmith.records.remote import RemoteJob, RemoteStatus, Rental
    from lorasmith.remote.rental.rent import Renter
    from lorasmith.remote.session import Session
    from lorasmith.remote.ssh import SshTransport


# A job on another machine as the commands see it: connected, shown in the terminal, ended with its code.


def open_job(name: str | None) -> Session:
    """The session of a job that this machine remembers."""
    from lorasmith.remote.state import find_job

    return open_session(find_job(name), None)


def open_session(job: RemoteJob, fingerprint: str | None) -> Session:
    """A connection to the job's machine, its key checked."""
    from lorasmith.remote.ssh import Host, Patience, SshTransport
    from lorasmith.remote.state import rental_at, rental_hosts

    user, _, name = job.host.rpartition("@")
    identity = Path(job.identity) if job.identity else None
    rental = rental_at(name, job.port)  # then its keys were pinned at the first contact
    known_hosts = rental_hosts(rental.label) if rental else None
    host = Host(name, user or None, job.port)
    transport = SshTransport(host, identity=identity, known_hosts=known_hosts)
    transport.trust(fingerprint=fingerprint, confirm=confirm_key if _interactive() else None)
    session = new_session(transport, job)
    session.patience = Patience(attempts=2)
    session.check()  # a machine that is not there shows at once; later, broken connections are waited for
    session.patience = Patience()
    return session


def new_session(transport: SshTransport, job: RemoteJob) -> Session:
    """A session that shows what it does in the terminal."""
    from lorasmith.cli.console import bar
    from lorasmith.remote.session import Session

    return Session(transport, job, progress=bar, say=relay)


_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")


def relay(line: str) -> None:
    """What the other machine tells, without colours; each state of a progress bar has a line of its own."""
    say(_COLOURS.sub("", line.rstrip("\r")).replace("\r", "\n"))


def confirm_key(name: str, prints: list[str]) -> bool:
    """Ask whether this is the right machine."""
    shown = "\n  ".join(prints)
    say(f"This machine is not known yet: {name}. It shows the keys\n  {shown}", stderr=True)
    return typer.confirm("Is one of them what its owner or provider tells?", err=True)


def ended(status: RemoteStatus) -> None:
    """End with the command's own exit code."""
    if status.code in (0, 1):
        say("done: results fetched and verified")
    raise typer.Exit(status.code if status.code is not None else 3)


def _interactive() -> bool:
    import sys

    return sys.stdin.isatty() and sys.stderr.isatty()


def renter_of(rental: Rental) -> Renter:
    """The provider of a machine that was rented before, under the caps that it was rented with."""
    from lorasmith.remote.rental.rent import open_renter

    return open_renter(rental.max_price, rental.max_cost, rental.max_hours, say)


@contextmanager
def looked_after(session: Session) -> Iterator[None]:
    """On a rented machine: be there for its watchdog, and hold the caps of the rental from here too."""
    from lorasmith.remote.rental.job import Watch
    from lorasmith.remote.state import rental_at

    rental = rental_at(session.job.host.rpartition("@")[2], session.job.port)
    if rental is None:
        yield
        return
    with Watch(renter_of(rental), session.transport, rental) as watch:
        session.alive = watch.require
        yield


def report_again(sent: RemoteCommand) -> None:
    """A run's own page, now that it is known what the machine cost."""
    if sent.name != "run":
        return
    from lorasmith.files.digests import reseal
    from lorasmith.reporting.page import write_report

    for run in (Path(item.local) for item in sent.outputs):
        if (run / "report.html").is_file():
            write_report(run, run / "report.html")
            reseal(run, run / "report.html")


Identity = Annotated[
    Path | None, typer.Option(help="Private key for ssh. [ssh's own choice]", metavar="FILE")
]
Fingerprint = Annotated[
    str | None, typer.Option(help="Fingerprint of the machine's host key, SHA256:…, for the first contact.")
]
JobName = Annotated[str | None, typer.Argument(help="Id of the job, or its beginning. [the newest]")]


def run(
    command: Annotated[list[str], typer.Argument(help="After --: any lorasmith command with local paths.")],
    host: Annotated[str | None, typer.Option(help="Machine to work on: user@host or user@host:port.")] = None,
    vast: Annotated[
        str | None,
        typer.Option(help='Rent a machine for it: conditions such as "gpu_name=H100_SXM num_gpus=1".'),
    ] = None,
    identity: Identity = None,
    fingerprint: Fingerprint = None,
    folder: Annotated[str, typer.Option(help="Folder of lorasmith on the machine.")] = "~/.lorasmith",
    remote_python: Annotated[
        str | None,
        typer.Option(help="An interpreter there with lorasmith's dependencies, instead of installing them."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="Name of a variable to pass on, such as HF_TOKEN; its value is never written."),
    ] = None,
    *,
    machine: MachineOptions,
    work: HoursOptions,
) -> None:
    """Run a command on another machine: upload, run detached, fetch, and verify every result.

    Lost connections are opened again. Given again after an interruption, the same command goes on where it
    was. A model given as hub:organisation/name[@revision] is fetched from the hub there. With --vast a
    machine is rented, and destroyed however the command ends. The exit code is that of the command.

    Example: `lorasmith remote run --host root@1.2.3.4:40022 -- run --base base --adapter adapter
    --test-set test.jsonl --output run`
    """
    from lorasmith.cli.remote.command import read_command
    from lorasmith.remote.job import make_job, require_free_outputs, require_inputs
    from lorasmith.remote.rental.first_contact import own_key
    from lorasmith.remote.rental.job import run_rented
    from lorasmith.remote.rental.rent import IMAGE, open_renter
    from lorasmith.remote.session import value_of
    from lorasmith.remote.ssh import parse_host
    from lorasmith.remote.state import rental_at

    if (host is None) == (vast is None):
        raise UsageError("where should it run?", expected="either --host user@machine or --vast CONDITIONS")
    sent = read_command(command)

    def make(login: str, port: int | None, key: str | None, price: float | None) -> RemoteJob:
        return make_job(
            login,
            port,
            sent.at_price(price),
            sent.inputs,
            sent.outputs,
            folder=folder,
            identity=key,
            hub=sent.hub,
            extras=sent.extras,
            python=remote_python,
            environment=env or [],
        )

    if host is not None:
        place = parse_host(host)
        rental = rental_at(place.name, place.port)
        key = identity or (own_key() if rental else None)
        price = rental.price_per_hour if rental else None
        job = make(place.login, place.port, str(key.absolute()) if key else None, price)
        if rental:  # where its results go is known before its cost is
            places = [*rental.outputs, *(item.local for item in job.outputs)]
            renter_of(rental).keep(rental, outputs=list(dict.fromkeys(places)))
        session = open_session(job, fingerprint)
        with looked_after(session):
            status = session.run(needs_gpu=sent.needs_gpu)
        ended(status)
    most = largest_cost(machine)
    # What would fail there in a quarter of an hour fails here, before money is spent.
    require_inputs(sent.inputs)
    require_free_outputs(sent.outputs)
    for name in env or []:
        value_of(name)
    need = needs(sent, work.hours, machine.disk)
    renter = open_renter(machine.max_price, most, machine.max_hours, say)
    chosen = choose_offer(renter, str(vast), machine.offer, need.disk)
    status = run_rented(
        renter,
        chosen,
        partial(make, price=chosen.price_per_hour),
        new_session,
        disk=need.disk,
        image=machine.image or IMAGE,
        needs_gpu=sent.needs_gpu,
        planned=need.estimate(chosen).dollars,
        outputs=[item.local for item in sent.outputs],
    )
    report_again(sent)
    ended(status)


def attach(job: JobName = None) -> None:
    """Follow a job that runs on another machine, then fetch and verify its results.

    Example: `lorasmith remote attach`
    """
    session = open_job(job)
    with looked_after(session):
        status = session.finish(session.attach())
    ended(status)


def status(job: JobName = None, as_json: AsJson = False) -> None:
    """Where a job on another machine stands.

    Example: `lorasmith remote status`
    """
    from lorasmith.cli.console import console, show_json

    session = open_job(job)
    now = session.status()
    if as_json:
        show_json(now.model_dump_json(indent=2))
        return
    screen = console()
    code = "" if now.code is None else f", exit code {now.code}"
    reason = f" ({now.reason})" if now.reason else ""
    seconds = "" if now.seconds is None else f", {now.seconds:,.0f} s"
    screen.print(
        f"{session.job.id} on {session.transport.where}: {now.phase}{code}{seconds}{reason}", markup=False
    )
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
    with looked_after(session):
        status = session.finish(session.status())
    ended(status)


def stop(job: JobName = None) -> None:
    """Stop a job as Ctrl-C would; `remote run` with the same command goes on with it.

    Example: `lorasmith remote stop`
    """
    now = open_job(job).stop()
    say(f"{now.phase}" + (f": {now.reason}" if now.reason else ""))


for _command in (attach, status, logs, fetch, stop):
    _command.works_without_arguments = True  # type: ignore[attr-defined]
