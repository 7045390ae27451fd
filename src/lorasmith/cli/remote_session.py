"""A job on another machine as the commands see it: connected, shown in the terminal, ended with its code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from lorasmith.cli.remote_command import RemoteCommand
    from lorasmith.records.remote import RemoteJob, RemoteStatus, Rental
    from lorasmith.remote.session import Session
    from lorasmith.remote.ssh import SshTransport


def open_job(name: str | None) -> Session:
    """The session of a job that this machine remembers."""
    from lorasmith.remote.state import find_job

    return open_session(find_job(name), None)


def open_session(job: RemoteJob, fingerprint: str | None) -> Session:
    """A connection to the job's machine, its key checked."""
    from lorasmith.remote.ssh import Host, SshTransport
    from lorasmith.remote.state import rental_at, rental_hosts
    from lorasmith.remote.transport import Patience

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


def follow(session: Session, rental: Rental | None, *, needs_gpu: bool) -> RemoteStatus:
    """Run the job; on a rented machine it is seen that somebody is there, under the caps of the rental."""
    if rental is None:
        return session.run(needs_gpu=needs_gpu)
    import time

    from lorasmith.remote.caps import Caps
    from lorasmith.remote.rented import Heartbeat

    caps = Caps(rental.max_price, rental.max_cost, rental.max_hours)
    with Heartbeat(session.transport, rental.label) as pulse:
        session.alive = lambda: caps.require_left(pulse.rental, time.time())
        return session.run(needs_gpu=needs_gpu)


def report_again(found: RemoteCommand) -> None:
    """A run's own page, now that it is known what the machine cost."""
    if found.name != "run":
        return
    from lorasmith.files.seal import reseal
    from lorasmith.steps.release import report

    for run in (Path(item.local) for item in found.outputs):
        if (run / "report.html").is_file():
            report(run)
            reseal(run, run / "report.html")
