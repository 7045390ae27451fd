"""A job on a machine that is rented for it: from the offer to the confirmed end, under caps at both ends."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import AccessError, MachineError, ProviderError, RemoteError
from lorasmith.files.digests import folder_files
from lorasmith.records.remote import RemoteJob, RemoteStatus, Rental, Transfer
from lorasmith.remote.provider import Instance, Offer
from lorasmith.remote.rental import Renter
from lorasmith.remote.session import Session
from lorasmith.remote.ssh import Host, SshTransport
from lorasmith.remote.state import state_folder

_SETUP_HOURS = 0.15
"""To start, pull the image and install: 5 to 9 minutes on machines of 2026 with 1 Gbit/s."""
_BEAT_SECONDS = 60.0
_SSH_SECONDS = 600.0
"""How long the ssh server of a running machine may take to answer."""


@dataclass(frozen=True)
class Estimate:
    """What a job on an offer will take."""

    hours: float
    dollars: float


def estimate(offer: Offer, work_hours: float, sent_gb: float, fetched_gb: float) -> Estimate:
    """Hours = set-up + work + GB · 8000 / (Mbit/s) / 3600 each way; dollars = hours · price + traffic."""
    there = sent_gb * 8000 / max(offer.download, 1.0) / 3600
    back = fetched_gb * 8000 / max(offer.upload, 1.0) / 3600
    hours = _SETUP_HOURS + work_hours + there + back
    return Estimate(hours, offer.cost(hours, sent_gb, fetched_gb))


def size_gb(inputs: list[Transfer]) -> float:
    """GB that a job sends; whatever does not exist counts nothing and is complained about later."""
    total = 0
    for item in inputs:
        path = Path(item.local)
        files = folder_files(path) if path.is_dir() else [path] if path.exists() else []
        total += sum(file.stat().st_size for file in files)
    return total / 1e9


def own_key() -> Path:
    """The ssh key that lorasmith uses for rented machines; made once."""
    path = state_folder() / "rented_ed25519"
    if not path.exists():
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lorasmith", "-f", str(path)]
        subprocess.run(command, check=True, capture_output=True)
    return path


def open_transport(renter: Renter, rental: Rental, found: Instance, *, user: str = "root") -> SshTransport:
    """A connection to a rented machine, once its ssh server answers.

    Nobody can tell the key of a machine that has just come to be: the first one seen is shown, and from then
    on no other is accepted. Raises `ProviderError` when ssh never comes, or the watchdog does not run.
    """
    if not found.host or not found.port:
        raise ProviderError("the machine has no address", where=f"instance {found.id}")
    key = own_key()
    renter.provider.allow_key(found.id, key.with_suffix(".pub").read_text().strip())
    known_hosts = state_folder() / "rentals" / f"{rental.label}.known_hosts"
    transport = SshTransport(Host(found.host, user, found.port), identity=key, known_hosts=known_hosts)

    def accept(name: str, prints: list[str]) -> bool:
        renter.say(f"host key of {name}: {', '.join(prints)} (new; pinned from now on)")
        return True

    until = renter.clock.now() + _SSH_SECONDS
    while True:
        try:
            transport.trust(confirm=accept)
            answer = transport.request({"do": "beat", "folder": "~/.lorasmith"})
            if answer.get("watchdog"):
                return transport
            problem: MachineError = RemoteError("the watchdog does not run on the machine")
        except (RemoteError, AccessError) as error:  # a key takes a while to reach the machine
            problem = error
        if renter.clock.now() >= until:
            raise ProviderError(
                f"the machine runs, but cannot be used: {problem.found}",
                where=f"instance {found.id}, {found.host}:{found.port}",
                remedy="take another offer",
            ) from problem
        renter.clock.sleep(5.0)


def run_rented(
    renter: Renter,
    offer: Offer,
    make: Callable[[str, int, str], RemoteJob],
    prepare: Callable[[SshTransport, RemoteJob], Session],
    *,
    disk: float,
    image: str,
    needs_gpu: bool = False,
) -> RemoteStatus:
    """Rent, run, fetch, verify and destroy. `make` makes the job for a host, a port and a key file.

    Raises `ProviderError` when a cap is reached before the results are here.
    """
    with renter.rented(offer, disk=disk, image=image) as rental:
        found = renter.wait_until_running(rental)
        renter.say("the machine runs; waiting for ssh")
        transport = open_transport(renter, rental, found)
        job = make(transport.host.login, transport.host.port or 22, str(own_key()))
        session = prepare(transport, job)
        session.alive = lambda: require_caps(renter, rental)
        with Heartbeat(transport):
            return session.run(needs_gpu=needs_gpu)


def require_caps(renter: Renter, rental: Rental) -> None:
    """Raise `ProviderError` once the hours or dollars of a rental are used up."""
    hours = (renter.clock.now() - rental.asked_at) / 3600
    allowed = renter.caps.hours_at(rental.price_per_hour)
    if hours >= allowed:
        raise ProviderError(
            f"the cap is reached: {hours:.2f} hours at ${rental.price_per_hour:.3f}",
            where=rental.label,
            expected=f"at most {renter.caps.hours:g} hours and ${renter.caps.cost:.2f}",
            remedy="raise --max-cost or --max-hours and give the command again",
        )


class Heartbeat:
    """Tells the watchdog now and then that somebody is here, for the length of a block."""

    def __init__(self, transport: SshTransport) -> None:
        self._transport = transport
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *ignored: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            with suppress(RemoteError):  # the next one may come through
                self._transport.request({"do": "beat", "folder": "~/.lorasmith"})
