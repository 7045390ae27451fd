"""Who rents out machines: a small interface, so that a second provider is one file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from lorasmith.errors import ProviderError


@dataclass(frozen=True)
class Offer:
    """A machine that can be rented."""

    id: int
    gpu: str
    gpus: int
    gpu_memory: int
    """Bytes of each GPU."""
    price_per_hour: float
    """US dollars while it runs, with the disk that was asked for."""
    disk_per_hour: float
    """US dollars of `price_per_hour` that the disk alone takes; also due while it is stopped."""
    upload_per_gb: float
    download_per_gb: float
    """US dollars for traffic to and from the machine."""
    reliability: float
    disk: float
    """GB that can be had."""
    upload: float
    download: float
    """Megabits a second towards the network and from it, seen from the machine."""
    place: str
    flops: float = 0.0
    """Single-precision operations a second of all GPUs, as the provider states them; 0 where it does not."""

    def cost(self, hours: float, sent_gb: float, fetched_gb: float) -> float:
        """US dollars: hours · price + what goes there · download + what comes back · upload."""
        traffic = sent_gb * self.download_per_gb + fetched_gb * self.upload_per_gb
        return hours * self.price_per_hour + traffic


@dataclass(frozen=True)
class Instance:
    """A machine that is rented, and paid for."""

    id: int | None
    """None where the provider's list shows it without a number that can be asked for."""
    label: str
    status: str
    """State in the provider's words: `loading`, `running`, `exited`, …"""
    price_per_hour: float | None
    """As the provider states it, a NaN or a negative one included; None where it states none."""
    host: str | None = None
    port: int | None = None
    """Port of its ssh server, once it has one."""


@dataclass(frozen=True)
class Charge:
    """What the provider has billed for one instance."""

    dollars: float
    price_per_hour: float | None = None
    """US dollars an hour, where the bill tells a rate; whatever it bills otherwise is not in it."""


@dataclass(frozen=True)
class OwnAccess:
    """How a rented machine reads its own price and destroys itself, with a key that is good for it alone."""

    url: str
    """Takes a GET and a DELETE; a shell on the machine expands it."""
    key: str
    """Variable that holds the key on the machine."""
    price: str
    """Names on the way to the price in the answer to the GET, joined by slashes."""


@dataclass(frozen=True)
class Wish:
    """What is asked for when an instance is created."""

    label: str
    disk: float
    """GB."""
    image: str
    onstart: str
    """Shell commands that run on the instance as it starts."""


class RefusedError(ProviderError):
    """The provider says for certain that nothing was rented: the offer is gone, there is no credit."""


class UncertainError(ProviderError):
    """Nobody knows whether it was done: the answer never came, or was none. Look before asking again."""


class Provider(Protocol):
    """One provider. Every call raises `ProviderError` when there is no usable answer."""

    name: str
    console: str
    """Where a person sees and destroys instances."""
    own_access: OwnAccess

    def offers(self, query: str, disk: float) -> list[Offer]:
        """What can be rented, the cheapest first."""

    def create(self, offer: int, wish: Wish) -> int:
        """Rent, with the label set by the same request; the instance's id.

        Sent once, never repeated. Raises `RefusedError` or `UncertainError`.
        """

    def instances(self) -> list[Instance]:
        """All instances of the account. Raises `ProviderError` rather than give a part of them."""

    def instance(self, number: int) -> Instance | None:
        """One instance; None only where the provider says that there is none."""

    def label(self, number: int, label: str) -> None:
        """Set the label of an instance that has lost it."""

    def destroy(self, number: int) -> None:
        """Give it back and delete its disk; no error when it is gone already."""

    def allow_key(self, number: int, public_key: str) -> None:
        """Let the holder of an ssh key in."""

    def log(self, number: int, containing: str) -> list[str]:
        """Lines of the instance's own log with this text, as the provider serves them."""

    def charges(self, since: float, until: float) -> dict[int, Charge]:
        """What was billed for each instance in days of this span (seconds since 1970)."""


class Clock(Protocol):
    """Time; a test brings its own."""

    def now(self) -> float:
        """Seconds since 1970."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class RealClock:
    """This machine's clock."""

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)
