"""A job on a machine that is rented for it: from the offer to the confirmed end, under caps at both ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import MachineError
from lorasmith.files.atomic import write_record
from lorasmith.files.seal import reseal
from lorasmith.files.spending import RENTALS
from lorasmith.records.remote import RemoteJob, RemoteStatus, Rental, RentalRecord, Transfer
from lorasmith.remote.job import input_bytes
from lorasmith.remote.provider import Offer
from lorasmith.remote.rental import Renter
from lorasmith.remote.session import Session
from lorasmith.remote.ssh import SshTransport
from lorasmith.remote.state import change_rental, rentals
from lorasmith.remote.transport import Transport
from lorasmith.remote.welcome import open_transport, own_key

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
