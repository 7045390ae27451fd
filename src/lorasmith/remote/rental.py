"""Renting without losing money: written down before it is asked for, never asked twice, always given back.

What may go wrong, and what then holds: an answer that never comes is looked up by the label before anything
else happens; every ending destroys what carries the label; "gone" needs the provider's word for that one
machine and a whole list without it, twice; and when this computer is gone, the watchdog on the machine
itself and `reap` remain.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lorasmith.errors import ProviderError, UsageError
from lorasmith.records.remote import Rental
from lorasmith.remote import watchdog
from lorasmith.remote.provider import (
    Clock,
    Instance,
    Offer,
    Provider,
    RealClock,
    RefusedError,
    UncertainError,
    Wish,
)
from lorasmith.remote.state import rentals, save_rental

PREFIX = "lorasmith-"
"""Of every label, and of nothing else in the account."""
IMAGE = "vastai/base-image:@vastai-automatic-tag"
_DEAD = {"exited", "unknown", "offline", "stopped", "error"}
"""States from which an instance does not come up by itself."""
_SETTLE = 120.0
"""Seconds in which an instance may take to appear in the list after it was bought."""
_SOON = 5.0
_POLL = 10.0
_CONFIRMATIONS = 2
_ONSTART_LIMIT = 4048
"""Characters that Vast.ai takes for `onstart`."""


@dataclass(frozen=True)
class Caps:
    """What may be spent at most."""

    price: float
    """US dollars an hour."""
    cost: float
    """US dollars in all."""
    hours: float
    grace: float = 1800.0
    """Seconds without a job and without anybody here, after which the machine destroys itself."""

    def hours_at(self, price: float) -> float:
        """Hours until the first of the caps is reached."""
        return min(self.hours, self.cost / price)

    def require(self, offer: Offer) -> None:
        """Raise `UsageError` for an offer over the caps."""
        if not 0 < offer.price_per_hour <= self.price:
            raise UsageError(
                f"this offer costs ${offer.price_per_hour:.3f} an hour",
                where=f"offer {offer.id}",
                expected=f"more than 0 and at most ${self.price:.3f}",
                remedy="choose another, or raise --max-price",
            )


@dataclass
class Renter:
    """Rents from one provider, under caps."""

    provider: Provider
    caps: Caps
    clock: Clock = field(default_factory=RealClock)
    say: Callable[[str], None] = lambda line: None
    start_seconds: float = 1200.0
    """How long an instance may take to run."""
    destroy_seconds: float = 1800.0
    """How long is tried to give it back."""
    url: str = "https://console.vast.ai"
    """Where the watchdog asks."""

    def rent(self, offer: Offer, *, disk: float, image: str = IMAGE, label: str | None = None) -> Rental:
        """Rent once; the rental is on disk before the request leaves, with the id as soon as it is known.

        Raises `RefusedError` when nothing was rented, `ProviderError` when that could not be found out: the
        watchdog and `reap` then take care of what may be there.
        """
        self.caps.require(offer)
        name = label or PREFIX + secrets.token_hex(6)
        rental = Rental(
            label=name,
            provider=self.provider.name,
            state="asked",
            offer=offer.id,
            price_per_hour=offer.price_per_hour,
            max_price=self.caps.price,
            max_cost=self.caps.cost,
            max_hours=self.caps.hours,
            asked_at=self.clock.now(),
        )
        save_rental(rental)
        onstart = watch_command(self.url, self.caps.hours_at(offer.price_per_hour), self.caps.grace)
        try:
            number = self.provider.create(offer.id, Wish(name, disk, image, onstart))
        except RefusedError:
            save_rental(rental.model_copy(update={"state": "refused", "gone_at": self.clock.now()}))
            raise
        except UncertainError as error:
            self.say(f"{error.found}; looking whether it was rented all the same")
            number = self._find(name)
        rental = rental.model_copy(update={"state": "rented", "instance": number})
        save_rental(rental)
        return rental

    def _find(self, label: str) -> int:
        """The id of the instance with this label, which may take a while to appear."""
        until = self.clock.now() + _SETTLE
        while self.clock.now() < until:
            self.clock.sleep(_SOON)
            with contextlib.suppress(ProviderError):
                found = self._labelled(label)
                if found:
                    return found[0].id
        raise ProviderError(
            "nobody can tell whether the machine was rented; nothing else is rented now",
            where=f"{self.provider.name}, label {label}",
            remedy="run `lorasmith remote reap` until it says that nothing is left",
        )

    def _labelled(self, label: str) -> list[Instance]:
        return sorted(
            (found for found in self.provider.instances() if found.label == label), key=lambda one: one.id
        )

    def wait_until_running(self, rental: Rental) -> Instance:
        """The instance with its address; raises `ProviderError` for one that does not start."""
        number = _number(rental)
        until = self.clock.now() + self.start_seconds
        status = "unknown"
        while self.clock.now() < until:
            try:
                found = self.provider.instance(number)
            except ProviderError as error:
                status = error.found
            else:
                status = found.status if found else "gone"
                if found and found.price_per_hour > self.caps.price:
                    raise ProviderError(
                        f"the machine costs ${found.price_per_hour:.3f} an hour, more than was offered",
                        where=f"instance {number}",
                        expected=f"at most ${self.caps.price:.3f}",
                    )
                if found and status == "running" and found.host and found.port:
                    return found
                if status in _DEAD:
                    break
            self.clock.sleep(_POLL)
        raise ProviderError(
            f"the machine did not start: it is {status}",
            where=f"{self.provider.name}, instance {number}",
            remedy="take another offer",
        )

    def give_back(self, rental: Rental) -> Rental:
        """Destroy everything with the rental's label, and make sure of it.

        The rental comes back as `gone`, or unchanged while it is not certain that it ever came about.
        Raises `ProviderError` with all that is needed to do it by hand when the provider cannot be reached
        for long; the rental then stays on the list that `reap` works through.
        """
        until = self.clock.now() + self.destroy_seconds
        known = {rental.instance} if rental.instance is not None else set()
        surely_over = rental.asked_at + rental.max_hours * 3600 + self.caps.grace
        confirmed, pause, problem = 0, _SOON, "nothing was tried"
        while True:
            if not confirmed:
                for number in sorted(known):  # at once, whether or not a list can be had
                    with contextlib.suppress(ProviderError):
                        self.provider.destroy(number)
            try:
                listed = {found.id for found in self._labelled(rental.label)}
                known |= listed
                left = {number for number in known if number in listed or self._is_there(number)}
                for number in left:
                    self.provider.destroy(number)
                problem = f"still there: {sorted(left)}"
                confirmed = 0 if left else confirmed + 1
                if confirmed >= _CONFIRMATIONS and not known and self.clock.now() < surely_over:
                    # Nobody ever saw an id to ask for, and a list without the label is no proof. If the
                    # machine exists, its watchdog ends it; until then the rental stays on `reap`'s list.
                    if self.clock.now() > rental.asked_at + _SETTLE:
                        self.say(f"no instance carries {rental.label}; run `lorasmith remote reap` later")
                        return rental
                elif confirmed >= _CONFIRMATIONS:
                    gone = rental.model_copy(update={"state": "gone", "gone_at": self.clock.now()})
                    save_rental(gone)
                    return gone
            except ProviderError as error:
                problem = error.found
            if self.clock.now() >= until:
                raise ProviderError(
                    f"A MACHINE MAY STILL RUN AND COST MONEY: {problem}",
                    where=f"{self.provider.name}, label {rental.label}, instances {sorted(known)}",
                    remedy="destroy it at https://console.vast.ai/instances/, or run `lorasmith remote reap`",
                )
            self.clock.sleep(pause)
            pause = min(pause * 1.5, 60.0)

    def _is_there(self, number: int) -> bool:
        """Whether the provider knows this instance; an error is not an answer and is passed on."""
        return self.provider.instance(number) is not None

    @contextmanager
    def rented(self, offer: Offer, *, disk: float, image: str = IMAGE) -> Iterator[Rental]:
        """A rental for the length of the block, given back in every ending of it."""
        label = PREFIX + secrets.token_hex(6)
        try:
            rental = self.rent(offer, disk=disk, image=image, label=label)
            self.say(f"rented instance {rental.instance} for ${rental.price_per_hour:.3f} an hour ({label})")
            yield rental
        finally:
            # Read again: when the answer was lost or this was interrupted, the file knows what is known.
            for open_one in open_rentals():
                if open_one.label == label:
                    gone = self.give_back(open_one)
                    if gone.state == "gone":
                        self.say(f"instance {gone.instance} is destroyed, and confirmed to be gone")

    def reap(self, *, everything: bool = False) -> list[Rental]:
        """Give back every rental of this computer that is not known to be gone.

        `everything`: also instances with lorasmith's labels that another computer rented.
        """
        known = {rental.label: rental for rental in open_rentals()}
        if everything:
            for found in self.provider.instances():
                if found.label.startswith(PREFIX) and found.label not in known:
                    known[found.label] = self._adopted(found)
        return [self.give_back(rental) for rental in known.values()]

    def _adopted(self, found: Instance) -> Rental:
        return Rental(
            label=found.label,
            provider=self.provider.name,
            state="rented",
            instance=found.id,
            price_per_hour=found.price_per_hour,
            max_price=self.caps.price,
            max_cost=self.caps.cost,
            max_hours=self.caps.hours,
            asked_at=self.clock.now(),
        )


def open_rentals() -> list[Rental]:
    """Rentals that may still cost money."""
    return [rental for rental in rentals() if rental.state in ("asked", "rented")]


def watch_command(url: str, hours: float, grace: float, folder: str = "~/.lorasmith") -> str:
    """Shell commands that start the watchdog on the machine; the program comes along, packed."""
    source = Path(watchdog.__file__).read_bytes()
    packed = base64.b64encode(gzip.compress(source, 9, mtime=0)).decode()
    target = "/root/lorasmith-watchdog.py"
    command = (
        "PATH=$PATH:/opt/conda/bin:/venv/main/bin; export PATH\n"
        f"echo {packed} | base64 -d | gzip -d > {target}\n"
        f"nohup python3 {target} {url} {hours:.4f} {grace:.0f} {folder}"
        " > /root/lorasmith-watchdog.log 2>&1 &\n"
    )
    if len(command) > _ONSTART_LIMIT:
        raise AssertionError(f"the watchdog is too long to be sent: {len(command)} characters")
    return command


def _number(rental: Rental) -> int:
    if rental.instance is None:
        raise ProviderError("this rental has no instance", where=rental.label)
    return rental.instance
