"""Renting without losing money: written down before it is asked for, never asked twice, always destroyed.

What may go wrong, and what then holds: an answer that never comes is looked up by the label before anything
else happens; every ending destroys what carries the label; "gone" needs the provider's word for that one
machine and a whole list without it, twice; what is on disk here may be damaged or removed meanwhile, and
keeps no machine running; and when this computer is gone, the watchdog on the machine itself and `reap`
remain.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import gzip
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lorasmith.errors import LorasmithError, ProviderError, UsageError
from lorasmith.files.costs import traffic_dollars
from lorasmith.records.remote import Rental
from lorasmith.remote.rental import caps as guard
from lorasmith.remote.rental import watchdog
from lorasmith.remote.rental.caps import Caps, Spending, breach, usable_price
from lorasmith.remote.rental.provider import (
    Clock,
    Instance,
    Offer,
    OwnAccess,
    Provider,
    RealClock,
    RefusedError,
    UncertainError,
    Wish,
)
from lorasmith.remote.rental.vast import URL, Vast, read_key
from lorasmith.remote.state import PREFIX, UnreadableRental, read_rentals, rentals, save_rental

# What a rented machine does as it starts: shell commands that bring the watchdog along, packed.


LIMIT = 4048
"""Characters that Vast.ai takes for `onstart`."""


def onstart(access: OwnAccess, caps: Caps, offer: Offer, folder: str = "~/.lorasmith") -> str:
    """Commands that start the watchdog, which knows caps and prices, and how to destroy the machine."""
    packed = base64.b64encode(gzip.compress(watchdog_program().encode(), 9, mtime=0)).decode()
    target = "/root/lorasmith-watchdog.py"
    numbers = watchdog.arguments(caps, offer.price_per_hour, offer.download_per_gb, offer.upload_per_gb)
    command = (
        "PATH=$PATH:/opt/conda/bin:/venv/main/bin; export PATH\n"
        f"echo {packed} | base64 -d | gzip -d > {target}\n"
        f"nohup python3 {target} {access.url} {access.key} {access.price} {folder} {numbers}"
        " > /root/lorasmith-watchdog.log 2>&1 &\n"
    )
    if len(command) > LIMIT:
        raise AssertionError(f"the watchdog is too long to be sent: {len(command)} characters")
    return command


def watchdog_program() -> str:
    """The guard of the caps and the watchdog as one program, without what only people read."""
    statements: list[ast.stmt] = []
    for module in (guard, watchdog):
        tree = ast.parse(Path(module.__file__ or "").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [one for one in node.body if not _is_text(one)] or [ast.Pass()]
        statements += tree.body
    imports = [one for one in statements if isinstance(one, ast.ImportFrom)]
    first = [one for one in imports if one.module == "__future__"]
    left_out = [*first, *(one for one in imports if str(one.module).startswith("lorasmith"))]
    rest = [one for one in statements if one not in left_out]
    return ast.unparse(ast.Module([*first[:1], *rest], []))


def _is_text(statement: ast.stmt) -> bool:
    """A docstring, of a module, class, function or constant."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


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


IMAGE = "vastai/base-image:@vastai-automatic-tag"
_DEAD = {"exited", "unknown", "offline", "stopped", "error"}
"""States from which an instance does not come up by itself."""
_SETTLE = 120.0
"""Seconds in which an instance may take to appear in the list after it was bought."""
_SOON, _POLL = 5.0, 10.0
_CONFIRMATIONS = 2
_LONGEST_HOURS = 48.0
"""How long a rental may have been meant to last whose record cannot be read."""


def open_renter(max_price: float, max_cost: float, max_hours: float, say: Callable[[str], None]) -> Renter:
    """The provider with the account's key, under caps; raises `UsageError` for a cap that allows nothing."""
    for flag, value in (("--max-price", max_price), ("--max-cost", max_cost), ("--max-hours", max_hours)):
        if not value > 0:
            raise UsageError(f"{flag} {value:g} allows nothing", expected=f"{flag} above 0")
    provider = Vast(read_key(), url=os.environ.get("LORASMITH_VAST_URL", URL), say=say)
    return Renter(provider, Caps(max_price, max_cost, max_hours), say=say)


def require_price(offer: Offer, caps: Caps) -> None:
    """Raise `UsageError` for an offer over the cap on the price, or without one."""
    if not 0 < offer.price_per_hour <= caps.price:
        raise UsageError(
            f"this offer costs ${offer.price_per_hour:.3f} an hour",
            where=f"offer {offer.id}",
            expected=f"more than 0 and at most ${caps.price:.3f}",
            remedy="choose another, or raise --max-price",
        )


def over_cap(caps: Caps, reason: str, where: str) -> ProviderError:
    """The message of a rental that ends because of its caps."""
    return ProviderError(
        reason,
        where=where,
        expected=f"at most ${caps.price:.2f} an hour and no rise, {caps.hours:g} hours, ${caps.cost:.2f}",
        remedy="raise --max-cost or --max-hours and give the command again, or take another offer",
    )


@dataclass(frozen=True)
class EndedRental:
    """What has become of one rental that was to be ended."""

    label: str
    instances: tuple[int, ...]
    state: Literal["gone", "not seen", "may run", "left alone"]
    problem: str = ""

    @property
    def line(self) -> str:
        """One line for a person."""
        numbers = f" (instance {', '.join(map(str, self.instances))})" if self.instances else ""
        what = {
            "gone": "gone",
            "not seen": "not seen; its watchdog ends it, ask again later",
            "may run": f"MAY STILL RUN AND COST MONEY: {self.problem}",
            "left alone": "rented by another computer, or its record here is lost; --all destroys it",
        }
        return f"{self.label}: {what[self.state]}{numbers}"


@dataclass
class _Ending:
    """One rental on its way out, step by step, so that a stubborn one keeps no other waiting."""

    rental: Rental
    suspected: set[int] = field(default_factory=set)
    """Numbers from a record that cannot be read: destroyed only where the label there is ours, or none."""
    unreadable: UnreadableRental | None = None
    known: set[int] = field(default_factory=set)
    confirmed: int = 0
    problem: str = "nothing was tried"
    state: Literal["", "gone", "not seen"] = ""

    def step(self, provider: Provider, now: float, grace: float) -> None:
        """Destroy what is known of it, and see whether it is gone."""
        if not self.confirmed:
            self._destroy(provider, self.known)  # at once, whether or not a list can be had
        try:
            listed = {one.id for one in labelled(provider, self.rental.label) if one.id is not None}
            self.known |= listed
            self._judge_suspects(provider)
            # An error is no answer about one of them, and is not taken for "gone".
            left = {one for one in self.known if one in listed or provider.instance(one) is not None}
        except ProviderError as error:
            self.problem = error.found
            return
        self._destroy(provider, left)
        self.problem = f"still there: {sorted(left)}"
        self.confirmed = 0 if left else self.confirmed + 1
        if self.confirmed < _CONFIRMATIONS:
            return
        surely_over = self.rental.asked_at + self.rental.max_hours * 3600 + grace
        if self.known or now >= surely_over:
            self.state = "gone"
        elif now > self.rental.asked_at + _SETTLE:
            # Nobody ever saw an id to ask for, and a list without the label is no proof. If the machine
            # exists, its watchdog ends it; until then the rental stays on `reap`'s list.
            self.state = "not seen"

    def _destroy(self, provider: Provider, numbers: set[int]) -> None:
        for number in sorted(numbers):
            with contextlib.suppress(ProviderError):  # asked again in the next step
                provider.destroy(number)

    def _judge_suspects(self, provider: Provider) -> None:
        for number in sorted(self.suspected):
            one = provider.instance(number)
            if one is not None and one.label in ("", self.rental.label):
                self.known.add(number)
            self.suspected.discard(number)


def labelled(provider: Provider, label: str) -> list[Instance]:
    """Instances with this label, by id; raises `ProviderError` for one that has no number to ask for."""
    ours = [one for one in provider.instances() if one.label == label]
    if any(one.id is None for one in ours):
        raise ProviderError("an instance with the label is listed without a usable number", where=label)
    return sorted(ours, key=lambda one: one.id or 0)


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
    _held: dict[str, Rental] = field(default_factory=dict)
    """What is known of the rentals of this process, should their files be lost."""

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
        require_price(offer, self.caps)
        name = label or PREFIX + secrets.token_hex(6)
        rental = self._rental(
            name,
            state="asked",
            offer=offer.id,
            price_per_hour=offer.price_per_hour,
            offered_price=offer.price_per_hour,
            disk_per_hour=offer.disk_per_hour,
            upload_per_gb=offer.upload_per_gb,
            download_per_gb=offer.download_per_gb,
            planned=planned,
            outputs=list(outputs),
        )
        start = onstart(self.provider.own_access, self.caps, offer)
        save_rental(rental)  # where this fails, nothing is rented
        self._held[name] = rental
        try:
            number = self.provider.create(offer.id, Wish(name, disk, image, start))
        except RefusedError:
            self.keep(rental, state="refused", gone_at=self.clock.now())
            raise
        except UncertainError as error:
            self.say(f"{error.found}; looking whether it was rented all the same")
            number = self._find(name)
        return self.keep(rental, state="rented", instance=number)

    def keep(self, rental: Rental, **changes: Any) -> Rental:
        """Remember what has become known of a rental, on disk where that is possible.

        Once a machine is rented, a full disk or a folder that is gone is no reason to let go of it.
        """
        changed = rental.model_copy(update=changes)
        self._held[rental.label] = changed
        try:
            save_rental(changed)
        except LorasmithError as error:
            self.say(f"cannot write down the rental {rental.label}: {error.found}")
        return changed

    def note(self, label: str, **changes: Any) -> Rental:
        """Remember what has become known of a rental of this computer: see `keep`."""
        rental = self.latest(label)
        if rental is None:
            raise ProviderError("this rental is not known here", where=label)
        return self.keep(rental, **changes)

    def latest(self, label: str) -> Rental | None:
        """What the file says of a rental, else what this process remembers of it."""
        try:
            on_disk = [one for one in rentals() if one.label == label]
        except LorasmithError:
            on_disk = []
        return on_disk[0] if on_disk else self._held.get(label)

    def _rental(self, label: str, **known: Any) -> Rental:
        """A rental under these caps, from now on."""
        settings = {
            "provider": self.provider.name,
            "max_price": self.caps.price,
            "max_cost": self.caps.cost,
            "max_hours": self.caps.hours,
            "asked_at": self.clock.now(),
        }
        return Rental(label=label, **{**settings, **known})

    def _find(self, label: str) -> int:
        """The id of the instance with this label, which may take a while to appear."""
        until = self.clock.now() + _SETTLE
        while self.clock.now() < until:
            self.clock.sleep(_SOON)
            with contextlib.suppress(ProviderError):
                for one in labelled(self.provider, label):
                    if one.id is not None:
                        return one.id
        raise ProviderError(
            "nobody can tell whether the machine was rented; nothing else is rented now",
            where=f"{self.provider.name}, label {label}",
            remedy="run `lorasmith remote reap` until it says that nothing is left",
        )

    def wait_until_running(self, rental: Rental) -> Instance:
        """The instance with its address; raises `ProviderError` where it does not start, or costs more."""
        if (number := rental.instance) is None:
            raise ProviderError("this rental has no instance", where=rental.label)
        until = self.clock.now() + self.start_seconds
        spending = spending_of(rental)
        status = "unknown"
        while self.clock.now() < until:
            try:
                shown = self.provider.instance(number)
            except ProviderError as error:
                status = error.found
            else:
                status = shown.status if shown else "gone"
                ready = shown and status == "running" and shown.host and shown.port
                if shown and shown.label != rental.label:  # by it `reap` finds it from another computer
                    with contextlib.suppress(ProviderError):
                        self.provider.label(number, rental.label)
                # Before it runs, a machine may not have its price yet; one that it has must be right.
                if shown and (ready or shown.price_per_hour is not None):
                    spending.see_price(shown.price_per_hour)
                if reason := breach(self.caps, spending, self.clock.now()):
                    raise over_cap(self.caps, reason, f"instance {number}")
                if shown and ready:
                    self.note(rental.label, price_per_hour=spending.price)
                    return shown
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
        (outcome,) = self._end([_ending(rental)])
        if outcome.state == "may run":
            raise ProviderError(
                f"A MACHINE MAY STILL RUN AND COST MONEY: {outcome.problem}",
                where=f"{self.provider.name}, label {rental.label}, instances {list(outcome.instances)}",
                remedy=f"destroy it at {self.provider.console}, or run `lorasmith remote reap`",
            )
        if outcome.state == "not seen":
            self.say(f"no instance carries {rental.label}; run `lorasmith remote reap` later")
            return rental
        return self._held[rental.label]

    def _end(self, endings: list[_Ending]) -> list[EndedRental]:
        """Step through all of them in turn until each is over, or there is no more time to try."""
        until = self.clock.now() + self.destroy_seconds
        pause = _SOON
        while True:
            for ending in (one for one in endings if not one.state):
                ending.step(self.provider, self.clock.now(), self.caps.grace)
                if ending.state == "gone":
                    self._record_end(ending)
            if all(ending.state for ending in endings) or self.clock.now() >= until:
                break
            self.clock.sleep(pause)
            pause = min(pause * 1.5, 60.0)
        return [
            EndedRental(
                one.rental.label,
                tuple(sorted(one.known | one.suspected)),
                one.state or "may run",
                one.problem,
            )
            for one in endings
        ]

    def _record_end(self, ending: _Ending) -> None:
        if ending.unreadable is not None:
            # Out of the way of the next look, and not deleted: somebody may want to know what it was.
            with contextlib.suppress(OSError):
                ending.unreadable.path.rename(ending.unreadable.path.with_suffix(".unreadable"))
            return
        known = self.latest(ending.rental.label) or ending.rental
        number = known.instance if known.instance is not None else min(ending.known, default=None)
        self.keep(known, state="gone", instance=number, gone_at=self.clock.now())

    @contextmanager
    def rented(self, offer: Offer, *, keep: bool = False, **asked: Any) -> Iterator[Rental]:
        """A rental (see `rent`) for the length of the block; the machine is destroyed however the block ends.

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
                # Looked up again: when the answer was lost or this was interrupted, more is known by now.
                known = self._held.get(label)
                if known is not None and known.state in ("asked", "rented") and not kept:
                    ended = self.give_back(known)
                    if ended.state == "gone":
                        self.say(f"instance {ended.instance} is destroyed, and confirmed to be gone")

    def reap(self, *, everything: bool = False) -> list[EndedRental]:
        """Give back every rental of this computer that is not known to be gone.

        `everything`: also instances with lorasmith's labels that this computer has no record of; otherwise
        they are told of, and left alone. No record, however damaged, and no machine, however stubborn, keeps
        the others from their end.
        """
        endings: list[_Ending] = []
        outcomes: list[EndedRental] = []
        try:
            whole, unreadable = read_rentals()
        except LorasmithError as error:
            self.say(f"what was rented from here cannot be read: {error.found}")
            whole, unreadable = [], []
        endings += [_ending(rental) for rental in whole if rental.state in ("asked", "rented")]
        for file in unreadable:
            self.say(f"a record cannot be read: {file.path}: {file.problem}")
            if file.label is not None:
                endings.append(self._salvaged(file, file.label))
        ended = {ending.rental.label for ending in endings}
        try:
            strays = {one.label: one for one in self.provider.instances() if one.label.startswith(PREFIX)}
        except ProviderError as error:
            # Without the list nobody knows what else runs: that is no "nothing is rented".
            outcomes.append(EndedRental("what else may be rented", (), "may run", error.found))
            strays = {}
        for label, one in strays.items():
            if label in ended:
                continue
            if everything:
                price = one.price_per_hour if usable_price(one.price_per_hour) else None
                known = self._rental(label, state="rented", instance=one.id, price_per_hour=price or 0.0)
                endings.append(_ending(known))
            else:
                outcomes.append(EndedRental(label, () if one.id is None else (one.id,), "left alone"))
        return [*self._end(endings), *outcomes]

    def _salvaged(self, file: UnreadableRental, label: str) -> _Ending:
        """An unreadable record as a rental: its age is that of the file, and it may have been a long one."""
        try:
            asked_at = min(file.path.lstat().st_mtime, self.clock.now())
        except OSError:
            asked_at = self.clock.now()
        rental = self._rental(
            label, state="asked", price_per_hour=0.0, asked_at=asked_at, max_hours=_LONGEST_HOURS
        )
        suspected = set() if file.instance is None else {file.instance}
        return _Ending(rental, suspected, file)


def _ending(rental: Rental) -> _Ending:
    return _Ending(rental, known=set() if rental.instance is None else {rental.instance})


def spending_of(rental: Rental) -> Spending:
    """What is known of a rental's cost, for the guard of the caps."""
    return Spending(
        began=rental.asked_at,
        offered=rental.offered_price or rental.price_per_hour,
        price=rental.price_per_hour,
        traffic=traffic_dollars(rental),
        ahead=rental.billed_ahead,
    )
