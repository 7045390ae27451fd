"""A job on a machine that is rented for it: from the offer to the confirmed end, under caps at both ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import MachineError
from lorasmith.files.atomic import write_record
from lorasmith.files.costs import RENTALS, traffic_dollars
from lorasmith.files.digests import reseal
from lorasmith.records.remote import RemoteJob, RemoteStatus, Rental, RentalRecord, Transfer
from lorasmith.remote.job import input_bytes
from lorasmith.remote.rental.caps import breach
from lorasmith.remote.rental.first_contact import open_transport, own_key
from lorasmith.remote.rental.provider import Offer
from lorasmith.remote.rental.rent import Renter, over_cap, spending_of
from lorasmith.remote.session import Session
from lorasmith.remote.ssh import SshTransport, Transport
from lorasmith.remote.state import rentals

SETUP_HOURS = 0.15
"""To start, pull the image and install: an estimate (4 GB at 1 Gbit/s, unpacking, starting), not measured."""
_BEAT_SECONDS = 60.0
"""Between two looks at a rented machine; the watchdog waits half an hour for the next one."""
_BILL_SECONDS = 600.0
"""Between two looks at its bill, which the provider adds to less often."""


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
            machine = renter.wait_until_running(rental)
            renter.say("the machine runs; waiting for ssh")
            transport = open_transport(renter, rental, machine)
            job = make(transport.host.login, transport.host.port or 22, str(own_key()))
            session = prepare(transport, job)
            with Watch(renter, transport, rental) as watch:
                session.alive = watch.require
                return session.run(needs_gpu=needs_gpu)
    finally:
        for place in outputs:
            record_rentals(Path(place))


def record_rentals(run: Path) -> None:
    """Write every ended rental whose results go to this run folder into it; no other folder gets the file."""
    if not (run / "timing.json").is_file():
        return
    known = [rental for rental in rentals() if str(run) in rental.outputs and rental.state == "gone"]
    if known:
        known.sort(key=lambda rental: rental.asked_at)
        write_record(run / RENTALS, RentalRecord(rentals=known))
        reseal(run, run / RENTALS)


class Watch:
    """Looks after a rented machine while work is done on it, in a thread of its own.

    Tells the watchdog that somebody is here and what the machine costs, and writes down what was transferred.
    `require` raises once a cap is reached or the price cannot be relied on.
    """

    def __init__(self, renter: Renter, transport: Transport, rental: Rental) -> None:
        self._renter = renter
        self._transport = transport
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.rental = renter.keep(renter.latest(rental.label) or rental)
        self._spending = spending_of(self.rental)
        self._bill_due = 0.0

    def __enter__(self) -> Watch:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(MachineError):  # the last count of its traffic; prices no longer matter
            self._beat()

    def _work(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            self.look()

    def require(self) -> None:
        """Raise `ProviderError` once the machine has to be given back."""
        caps = self._renter.caps
        if reason := breach(caps, self._spending, self._renter.clock.now()):
            raise over_cap(caps, reason, self.rental.label)

    def look(self) -> None:
        """One look at price, bill and machine; what cannot be read now is read the next time."""
        for read in (self._see_price, self._see_bill, self._beat):
            with suppress(MachineError):
                read()
        self.rental = self._renter.note(
            self.rental.label, price_per_hour=self._spending.price, billed_ahead=self._spending.ahead
        )

    def _see_price(self) -> None:
        if self.rental.instance is None:
            return
        machine = self._renter.provider.instance(self.rental.instance)
        if machine is not None:
            self._spending.see_price(machine.price_per_hour)

    def _see_bill(self) -> None:
        now = self._renter.clock.now()
        if self.rental.instance is None or now < self._bill_due:
            return
        self._bill_due = now + _BILL_SECONDS
        charge = self._renter.provider.charges(self.rental.asked_at, now).get(self.rental.instance)
        if charge is not None:
            self._spending.see_bill(charge.dollars, now)
            if charge.price_per_hour is not None:
                self._spending.see_price(charge.price_per_hour)

    def _beat(self) -> None:
        price = None if self._spending.wrong else self._spending.price  # none ends it there as well
        told = {"price": price, "ahead": self._spending.ahead}
        answer = self._transport.request({"do": "beat", "folder": "~/.lorasmith", "told": told})
        counts = [answer.get(name) for name in ("received", "sent")]
        received, sent = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
        self.rental = self._renter.note(
            self.rental.label,
            # A machine that counts anew, or backwards, takes nothing back of what was seen before.
            received_bytes=max(self.rental.received_bytes, received),
            sent_bytes=max(self.rental.sent_bytes, sent),
        )
        self._spending.traffic = traffic_dollars(self.rental)
