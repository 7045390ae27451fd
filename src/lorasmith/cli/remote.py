"""`lorasmith remote run | attach | status | logs | fetch | stop`: any command on any machine by ssh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson
from lorasmith.cli.remote_rent import (
    Disk,
    Image,
    MaxHours,
    MaxPrice,
    choose_offer,
    open_renter,
    transfer_sizes,
)
from lorasmith.errors import UsageError

if TYPE_CHECKING:
    from lorasmith.records.remote import RemoteJob, RemoteStatus
    from lorasmith.remote.session import Session
    from lorasmith.remote.ssh import SshTransport

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
    from lorasmith.remote.job import make_job
    from lorasmith.remote.rental import IMAGE
    from lorasmith.remote.rented import run_rented
    from lorasmith.remote.ssh import parse_host

    if (host is None) == (vast is None):
        raise UsageError("where should it run?", expected="either --host user@machine or --vast CONDITIONS")
    found = read_command(command)

    def make(login: str, port: int | None, key: str | None) -> RemoteJob:
        return make_job(
            login,
            port,
            found.arguments,
            found.inputs,
            found.outputs,
            folder=folder,
            identity=key,
            hub=found.hub,
            extras=["benchmarks"] if found.benchmarks else [],
            python=remote_python,
            environment=env or [],
        )

    if host is not None:
        place = parse_host(host)
        job = make(place.login, place.port, str(identity.absolute()) if identity else None)
        ended(open_session(job, fingerprint).run(needs_gpu=found.needs_gpu))
    if max_cost is None:
        raise UsageError("--vast spends money", expected="--max-cost, in US dollars")
    space = disk or transfer_sizes(found)[2]
    renter = open_renter(max_price, max_cost, max_hours)
    chosen = choose_offer(renter, str(vast), offer, space)
    ended(
        run_rented(
            renter, chosen, make, new_session, disk=space, image=image or IMAGE, needs_gpu=found.needs_gpu
        )
    )


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


def open_job(name: str | None) -> Session:
    """The session of a job that this machine remembers."""
    from lorasmith.remote.state import find_job

    return open_session(find_job(name), None)


def open_session(job: RemoteJob, fingerprint: str | None) -> Session:
    """A connection to the job's machine, its key checked."""
    from lorasmith.remote.ssh import Host, SshTransport
    from lorasmith.remote.transport import Patience

    user, _, name = job.host.rpartition("@")
    identity = Path(job.identity) if job.identity else None
    transport = SshTransport(Host(name, user or None, job.port), identity=identity)
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

    return Session(transport, job, progress=bar, say=say)


def say(line: str) -> None:
    """What the other machine tells."""
    typer.echo(line)


def confirm_key(name: str, prints: list[str]) -> bool:
    """Ask whether this is the right machine."""
    shown = "\n  ".join(prints)
    typer.echo(f"This machine is not known yet: {name}. It shows the keys\n  {shown}", err=True)
    return typer.confirm("Is one of them what its owner or provider tells?", err=True)


def ended(found: RemoteStatus) -> None:
    """End with the command's own exit code."""
    if found.code in (0, 1):
        typer.echo("done: results fetched and verified")
    raise typer.Exit(found.code if found.code is not None else 3)


def _interactive() -> bool:
    import sys

    return sys.stdin.isatty() and sys.stderr.isatty()
