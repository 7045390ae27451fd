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
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from lorasmith.errors import ProviderError, UsageError
from lorasmith.files.costs import rental_cost
from lorasmith.records.remote import Rental
from lorasmith.remote.agent import watchdog
from lorasmith.remote.rental.provider import (
    Clock,
    Farewell,
    Instance,
    Offer,
    Provider,
    RealClock,
    RefusedError,
    UncertainError,
    Wish,
)
from lorasmith.remote.state import open_rentals, save_rental

# What may be spent on a rented machine, and what has been.


@dataclass(frozen=True)
class Caps:
    """What may be spent at most."""

    price: float
    """US dollars an hour."""
    cost: float
    """US dollars in all, traffic included."""
    hours: float
    grace: float = 1800.0
    """Seconds without a job and without anybody here, after which the machine destroys itself."""

    def require(self, offer: Offer) -> None:
        """Raise `UsageError` for an offer over the caps."""
        if not 0 < offer.price_per_hour <= self.price:
            raise UsageError(
                f"this offer costs ${offer.price_per_hour:.3f} an hour",
                where=f"offer {offer.id}",
                expected=f"more than 0 and at most ${self.price:.3f}",
                remedy="choose another, or raise --max-price",
            )

    def require_left(self, rental: Rental, now: float) -> None:
        """Raise `ProviderError` once the hours or dollars of a rental are used up."""
        spent = rental_cost(rental, now)
        if spent.hours < self.hours and spent.dollars < self.cost:
            return
        raise ProviderError(
            f"the cap is reached: ${spent.dollars:.2f} in {spent.hours:.2f} hours at"
            f" ${rental.price_per_hour:.3f}, ${spent.traffic:.2f} of it for traffic",
            where=rental.label,
            expected=f"at most {self.hours:g} hours and ${self.cost:.2f}",
            remedy="raise --max-cost or --max-hours and give the command again",
        )


# What a rented machine does as it starts: shell commands that bring the watchdog along, packed.


LIMIT = 4048
"""Characters that Vast.ai takes for `onstart`."""


def onstart(farewell: Farewell, caps: Caps, offer: Offer, folder: str = "~/.lorasmith") -> str:
    """Commands that start the watchdog, which knows the caps and prices, and how to destroy the machine."""
    source = Path(watchdog.__file__).read_bytes()
    packed = base64.b64encode(gzip.compress(source, 9, mtime=0)).decode()
    target = "/root/lorasmith-watchdog.py"
    limits = f"{caps.hours:.4f} {caps.grace:.0f} {caps.cost:.4f}"
    prices = f"{offer.price_per_hour:.6f} {offer.download_per_gb:.6f} {offer.upload_per_gb:.6f}"
    command = (
        "PATH=$PATH:/opt/conda/bin:/venv/main/bin; export PATH\n"
        f"echo {packed} | base64 -d | gzip -d > {target}\n"
        f"nohup python3 {target} {farewell.url} {farewell.key} {folder} {limits} {prices}"
        " > /root/lorasmith-watchdog.log 2>&1 &\n"
    )
    if len(command) > LIMIT:
        raise AssertionError(f"the watchdog is too long to be sent: {len(command)} characters")
    return command


# Impatience must not cost money: the first Ctrl-C ends the work, no other one the cleaning up.


_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def one_stop(say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Let one SIGINT or SIGTERM through to its handler, and answer all others with what is going on.

    Call what it yields where even the first must not come through any more. In another thread than the main
    one, which alone such signals reach, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in _STOPS}
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True

    def answer(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if stopped:
            say("destroying the machine first (Ctrl-\\ ends this at once: then run `lorasmith remote reap`)")
        elif callable(handler):
            stop()  # before the handler raises: nothing may come in between
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            stop()
            raise SystemExit(128 + number)

    for number in _STOPS:
        signal.signal(number, answer)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


PREFIX = "lorasmith-"
"""Of every label, and of nothing else in the account."""
IMAGE = "vastai/base-image:@vastai-automatic-tag"
_DEAD = {"exited", "unknown", "offline", "stopped", "error"}
"""States from which an instance does not come up by itself."""
_SETTLE = 120.0
"""Seconds in which an instance may take to appear in the list after it was bought."""
_SOON, _POLL = 5.0, 10.0
_CONFIRMATIONS = 2


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

    def rent(
        self,
        offer: Offer,
        *,
        disk: float,
        image: str = IMAGE,
        label: str | None = None,
        planned: float | None = None,
        outputs: Sequence[str] = (),
    ) -> Rental:
        """Rent once; the rental is on disk before the request leaves, with the id as soon as it is known.

        `planned`: US dollars that were estimated; `outputs`: where results go here. Both are only recorded.
        Raises `RefusedError` when nothing was rented, `ProviderError` when that could not be found out: the
        watchdog and `reap` then take care of what may be there.
        """
        self.caps.require(offer)
        name = label or PREFIX + secrets.token_hex(6)
        rental = self._rental(
            name,
            state="asked",
            offer=offer.id,
            price_per_hour=offer.price_per_hour,
            disk_per_hour=offer.disk_per_hour,
            upload_per_gb=offer.upload_per_gb,
            download_per_gb=offer.download_per_gb,
            planned=planned,
            outputs=list(outputs),
        )
        save_rental(rental)
        start = onstart(self.provider.farewell, self.caps, offer)
        try:
            number = self.provider.create(offer.id, Wish(name, disk, image, start))
        except RefusedError:
            save_rental(rental.model_copy(update={"state": "refused", "gone_at": self.clock.now()}))
            raise
        except UncertainError as error:
            self.say(f"{error.found}; looking whether it was rented all the same")
            number = self._find(name)
        rental = rental.model_copy(update={"state": "rented", "instance": number})
        save_rental(rental)
        return rental

    def _rental(self, label: str, **known: Any) -> Rental:
        """A rental under these caps, from now on."""
        return Rental(
            label=label,
            provider=self.provider.name,
            max_price=self.caps.price,
            max_cost=self.caps.cost,
            max_hours=self.caps.hours,
            asked_at=self.clock.now(),
            **known,
        )

    def _find(self, label: str) -> int:
        """The id of the instance with this label, which may take a while to appear."""
        until = self.clock.now() + _SETTLE
        while self.clock.now() < until:
            self.clock.sleep(_SOON)
            with contextlib.suppress(ProviderError):
                if found := self._labelled(label):
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
        if (number := rental.instance) is None:
            raise ProviderError("this rental has no instance", where=rental.label)
        until = self.clock.now() + self.start_seconds
        status = "unknown"
        while self.clock.now() < until:
            try:
                found = self.provider.instance(number)
            except ProviderError as error:
                status = error.found
            else:
                status = found.status if found else "gone"
                if found and found.label != rental.label:  # by it `reap` finds it from another computer
                    with contextlib.suppress(ProviderError):
                        self.provider.label(number, rental.label)
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
                # An error is no answer about one of them, and is not taken for "gone".
                left = {one for one in known if one in listed or self.provider.instance(one) is not None}
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
                    remedy=f"destroy it at {self.provider.console}, or run `lorasmith remote reap`",
                )
            self.clock.sleep(pause)
            pause = min(pause * 1.5, 60.0)

    @contextmanager
    def rented(self, offer: Offer, *, keep: bool = False, **asked: Any) -> Iterator[Rental]:
        """A rental (see `rent`) for the length of the block, given back in every ending of it.

        `keep`: not where the block comes to its end.
        """
        label, kept = PREFIX + secrets.token_hex(6), False
        with one_stop(self.say) as stop_no_more:
            try:
                try:
                    rental = self.rent(offer, label=label, **asked)
                    price = f"${rental.price_per_hour:.3f} an hour"
                    self.say(f"rented instance {rental.instance} for {price} ({label})")
                    yield rental
                    kept = keep
                finally:
                    stop_no_more()
            finally:
                # Read again: when the answer was lost or this was interrupted, the file knows what is known.
                for known in [one for one in open_rentals() if one.label == label and not kept]:
                    if (gone := self.give_back(known)).state == "gone":
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
        price = found.price_per_hour
        return self._rental(found.label, state="rented", instance=found.id, price_per_hour=price)
