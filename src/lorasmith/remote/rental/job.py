"""A job on a machine that is rented for it: from the offer to the confirmed end, under caps at both ends."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import AccessError, ConnectionLostError, MachineError, ProviderError, RemoteError
from lorasmith.files.atomic import write_record
from lorasmith.files.costs import RENTALS
from lorasmith.files.digests import reseal
from lorasmith.records.remote import RemoteJob, RemoteStatus, Rental, RentalRecord, Transfer
from lorasmith.remote.agent.watchdog import SIGN
from lorasmith.remote.job import input_bytes
from lorasmith.remote.rental.provider import Instance, Offer
from lorasmith.remote.rental.rent import Renter
from lorasmith.remote.session import Session
from lorasmith.remote.ssh import Host, SshTransport, Transport
from lorasmith.remote.state import change_rental, rental_hosts, rentals, state_folder

# The first contact with a rented machine: whose host key is it, and does the watchdog run there?
#
# Nothing tells the key of a machine that has just come to be, but the machine itself, in its log, which the
# provider serves over https to whoever has the account's key. Where the log stays silent, the first key seen
# is taken, and that is said and recorded. From then on no other is accepted.


SSH_SECONDS = 600.0
"""How long the ssh server of a running machine may take to answer."""
LOG_SECONDS = 120.0
"""How long the host key may take to appear in the machine's log."""
_PAUSE = 5.0
_PRINT = re.compile(rf"{SIGN} (SHA256:[A-Za-z0-9+/]{{43}})(?![A-Za-z0-9+/])")


def own_key() -> Path:
    """The ssh key that lorasmith uses for rented machines; made once."""
    path = state_folder() / "rented_ed25519"
    if not path.exists():
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lorasmith", "-f", str(path)]
        subprocess.run(command, check=True, capture_output=True)
    return path


def open_transport(renter: Renter, rental: Rental, found: Instance, *, user: str = "root") -> SshTransport:
    """A connection to a rented machine, once its ssh server answers, with its host keys pinned.

    Raises `ProviderError` when ssh never comes or the watchdog does not run, `RemoteError` for a machine with
    other keys than its log tells.
    """
    if not found.host or not found.port:
        raise ProviderError("the machine has no address", where=f"instance {found.id}")
    key = own_key()
    renter.provider.allow_key(found.id, key.with_suffix(".pub").read_text().strip())
    hosts = rental_hosts(rental.label)
    transport = SshTransport(Host(found.host, user, found.port), identity=key, known_hosts=hosts)
    change_rental(rental.label, host=found.host, port=found.port)
    told = _told(renter, found.id)
    until = renter.clock.now() + SSH_SECONDS
    pinned = False
    while True:
        try:
            if not pinned:
                _pin(renter, rental, transport, told)
                pinned = True
            if transport.request({"do": "beat", "folder": "~/.lorasmith"}).get("watchdog"):
                return transport
            problem: MachineError = RemoteError("the watchdog does not run on the machine")
        except (ConnectionLostError, AccessError) as error:  # server and key take a while
            problem = error
        if renter.clock.now() >= until:
            raise ProviderError(
                f"the machine runs, but cannot be used: {problem.found}",
                where=f"instance {found.id}, {found.host}:{found.port}",
                remedy="take another offer",
            ) from problem
        renter.clock.sleep(_PAUSE)


def _pin(renter: Renter, rental: Rental, transport: SshTransport, told: list[str]) -> None:
    """Accept the keys that the log tells, or the first ones seen; either way write down which, and why."""

    def accept(name: str, prints: list[str]) -> bool:
        renter.say(
            f"host key of {name}: {', '.join(prints)}. The provider tells none, so that this one is taken on"
            " trust; from now on no other is accepted"
        )
        return True

    prints = transport.trust(fingerprint=told) if told else transport.trust(confirm=accept)
    if told:
        renter.say(f"host key {', '.join(prints)}: as the machine's log at {renter.provider.name} tells")
    change_rental(
        rental.label,
        host_keys=prints,
        host_key_from="the instance's log" if told else "first contact",
    )


def _told(renter: Renter, number: int) -> list[str]:
    """Fingerprints in the machine's own log; none where it does not appear in time."""
    until = renter.clock.now() + LOG_SECONDS
    while True:
        try:
            lines = renter.provider.log(number, SIGN)
        except ProviderError:
            lines = []
        found = [match[1] for line in lines if (match := _PRINT.search(line))]
        if found or renter.clock.now() >= until:
            return list(dict.fromkeys(found))
        renter.clock.sleep(_PAUSE)


SETUP_HOURS = 0.15
"""To start, pull the image and install: an estimate (4 GB at 1 Gbit/s, unpacking, starting), not measured."""
_BEAT_SECONDS = 60.0


@dataclass(frozen=True)
class Estimate:
    """What a job on an offer will take."""

    hours: float
    dollars: float


def estimate(offer: Offer, work_hours: float, sent_gb: float, fetched_gb: float) -> Estimate:
    """Hours = set-up + work + GB · 8000 / (Mbit/s) / 3600 each way; dollars = hours · price + traffic."""
    there = sent_gb * 8000 / max(offer.download, 1.0) / 3600
    back = fetched_gb * 8000 / max(offer.upload, 1.0) / 3600
    hours = SETUP_HOURS + work_hours + there + back
    return Estimate(hours, offer.cost(hours, sent_gb, fetched_gb))


def size_gb(inputs: list[Transfer]) -> float:
    """GB that a job sends."""
    return sum(input_bytes(item) for item in inputs) / 1e9


def run_rented(
    renter: Renter,
    offer: Offer,
    make: Callable[[str, int, str], RemoteJob],
    prepare: Callable[[SshTransport, RemoteJob], Session],
    *,
    disk: float,
    image: str,
    needs_gpu: bool = False,
    planned: float | None = None,
    outputs: Sequence[str] = (),
) -> RemoteStatus:
    """Rent, run, fetch, verify and destroy. `make` makes the job for a host, a port and a key file.

    What the rental cost is written beside the results. Raises `ProviderError` when a cap is reached before
    the results are here.
    """
    try:
        with renter.rented(offer, disk=disk, image=image, planned=planned, outputs=outputs) as rental:
            found = renter.wait_until_running(rental)
            renter.say("the machine runs; waiting for ssh")
            transport = open_transport(renter, rental, found)
            job = make(transport.host.login, transport.host.port or 22, str(own_key()))
            session = prepare(transport, job)
            with Heartbeat(transport, rental.label) as pulse:
                session.alive = lambda: renter.caps.require_left(pulse.rental, renter.clock.now())
                return session.run(needs_gpu=needs_gpu)
    finally:
        for place in outputs:
            record_rentals(Path(place))


def remember_outputs(label: str, job: RemoteJob) -> None:
    """Note on the rental where the results of a job go, for the day when its cost is known."""
    places = [*change_rental(label).outputs, *(item.local for item in job.outputs)]
    change_rental(label, outputs=list(dict.fromkeys(places)))


def record_rentals(run: Path) -> None:
    """Write every ended rental whose results go to this run folder into it; no other folder gets the file."""
    if not (run / "timing.json").is_file():
        return
    known = [rental for rental in rentals() if str(run) in rental.outputs and rental.state == "gone"]
    if known:
        known.sort(key=lambda rental: rental.asked_at)
        write_record(run / RENTALS, RentalRecord(rentals=known))
        reseal(run, run / RENTALS)


class Heartbeat:
    """Tells the watchdog now and then that somebody is here, and writes down what was transferred."""

    def __init__(self, transport: Transport, label: str) -> None:
        self._transport = transport
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.rental: Rental = change_rental(label)

    def __enter__(self) -> Heartbeat:
        self._once()
        self._thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._over.set()
        self._thread.join()
        self._once()

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            self._once()

    def _once(self) -> None:
        with suppress(MachineError):  # the next one may come through
            answer = self._transport.request({"do": "beat", "folder": "~/.lorasmith"})
            self.rental = change_rental(
                self.rental.label,
                # A machine that was restarted counts anew: what was seen before is not taken back.
                received_bytes=max(self.rental.received_bytes, int(answer["received"])),
                sent_bytes=max(self.rental.sent_bytes, int(answer["sent"])),
            )
