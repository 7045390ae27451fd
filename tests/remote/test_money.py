"""`--max-cost` holds on what is billed: prices that rise, vanish or are none, and bills that exceed them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import ConnectionLostError, LorasmithError, ProviderError
from lorasmith.records.remote import Rental
from lorasmith.remote.rental.caps import Caps
from lorasmith.remote.rental.job import Watch
from lorasmith.remote.rental.provider import Offer
from lorasmith.remote.rental.rent import Renter
from lorasmith.remote.rental.vast import Vast
from lorasmith.remote.state import rentals
from tests.remote.vast_server import (
    KEY,
    FakeInstance,
    FakeVast,
    PowerLoss,
    SimulatedClock,
    an_offer,
    random_faults,
    serve,
)

CAPS = Caps(price=4.0, cost=2.0, hours=6.0)
SEQUENCES = int(os.environ.get("LORASMITH_FAULT_SEQUENCES", "100"))
LATE = 5 / 60
"""Hours that an end may be late: see `test_rental.py`."""


@pytest.fixture(scope="module")
def use() -> Iterator[Callable[[FakeVast], None]]:
    with serve() as given:
        yield given


@pytest.fixture
def vast(use: Callable[[FakeVast], None]) -> FakeVast:
    made = FakeVast(SimulatedClock(), offers=[an_offer(1, 0.5)])
    use(made)
    return made


class Line:
    """The connection to a rented machine: what the client tells its watchdog by it."""

    where = "root@rented"

    def __init__(self, one: FakeInstance, clock: SimulatedClock) -> None:
        self.one, self.clock, self.cut = one, clock, False

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.cut:
            raise ConnectionLostError("cut")
        self.one.beat, self.one.told = self.clock.time, json.dumps(request["told"])
        return {"ok": True, "watchdog": True, "received": 0, "sent": 0}

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield self.request(request)

    def send(self, *given: object) -> None:
        raise NotImplementedError

    receive = send


def renter_for(vast: FakeVast, caps: Caps = CAPS) -> Renter:
    return Renter(Vast(KEY, url=vast.url, clock=vast.clock, timeout=5.0), caps, clock=vast.clock)


def offered(renter: Renter) -> Offer:
    return renter.provider.offers("", 50)[0]


def work(renter: Renter, vast: FakeVast, rental: Rental, minutes: int) -> None:
    """A job that is busy for so long, looked after once a minute as by the client's thread."""
    (one,) = vast.running()
    one.busy = True
    watch = Watch(renter, Line(one, vast.clock), rental)
    for _ in range(minutes):
        watch.look()
        watch.require()
        vast.clock.sleep(60)
        if one.gone_at is not None:
            raise RuntimeError("the machine is gone")


def test_a_price_that_rose_between_search_and_purchase_ends_the_rental_unused(vast: FakeVast) -> None:
    renter = renter_for(vast)
    offer = offered(renter)
    vast.offers[0]["dph_total"] = 3.9  # below --max-price, and eight times what was agreed to
    with (
        pytest.raises(ProviderError, match=r"costs \$3\.900 an hour, more than the \$0\.500 offered"),
        renter.rented(offer, disk=50) as rental,
    ):
        renter.wait_until_running(rental)
    assert not vast.running()
    assert vast.cost(next(iter(vast.instances.values()))) <= 3.9 * LATE


@pytest.mark.parametrize(
    "price", [0.6, 3.9, 40.0, float("nan"), float("inf"), -1.0, 0, None, "0.5", True, []]
)
@pytest.mark.parametrize("end", ["client alone", "watchdog alone", "watchdog that the client tells"])
def test_a_price_that_rises_or_is_none_while_it_runs_ends_the_rental_from_either_end(
    vast: FakeVast, monkeypatch: pytest.MonkeyPatch, price: object, end: str
) -> None:
    renter = renter_for(vast)
    rental = renter.rent(offered(renter), disk=50)
    renter.wait_until_running(rental)
    work(renter, vast, rental, 3)
    (one,) = vast.running()
    if end != "watchdog alone":  # as where the machine's own key may not read its price
        monkeypatch.setattr("lorasmith.remote.rental.watchdog.Watchdog.see_answer", lambda *given: None)
    one.price = price
    if end != "watchdog alone":
        line = Line(one, vast.clock)
        line.cut = end == "client alone"
        watch = Watch(renter, line, rental)
        watch.look()
        with pytest.raises(ProviderError, match=r"no price|more than the \$0\.500 offered"):
            watch.require()
    vast.clock.sleep(30)
    assert (one.gone_at is None) == (end == "client alone")


def test_roundings_of_two_answers_are_no_rise_and_count_at_the_higher_price(vast: FakeVast) -> None:
    renter = renter_for(vast)
    with renter.rented(offered(renter), disk=50) as rental:
        renter.wait_until_running(rental)
        vast.running()[0].price = 0.504
        work(renter, vast, rental, 5)
    (ended,) = rentals()
    assert (ended.price_per_hour, ended.offered_price) == (0.504, 0.5)


def test_what_is_billed_beyond_our_own_count_counts(vast: FakeVast) -> None:
    """A dollar more than time and traffic come to, of two: the hours left are two in place of four."""
    renter = renter_for(vast)
    with suppress(ProviderError, RuntimeError), renter.rented(offered(renter), disk=50) as rental:
        renter.wait_until_running(rental)
        (one,) = vast.running()
        began = vast.clock.time
        vast.bills[one.id] = 1.0 + vast.cost(one)
        work(renter, vast, rental, 400)
    assert one.gone_at is not None and 1.9 < (one.gone_at - began) / 3600 < 2.05
    (ended,) = rentals()
    assert ended.billed_ahead == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("amount", [float("nan"), -3.0, 1e9])
def test_a_bill_that_is_none_ends_the_rental(vast: FakeVast, amount: float) -> None:
    renter = renter_for(vast)
    with pytest.raises(ProviderError), renter.rented(offered(renter), disk=50) as rental:
        renter.wait_until_running(rental)
        vast.bills[vast.running()[0].id] = amount
        work(renter, vast, rental, 30)
    assert not vast.running()


def test_a_rate_in_the_bill_that_is_higher_than_the_price_shown_ends_the_rental(vast: FakeVast) -> None:
    renter = renter_for(vast)
    with (
        pytest.raises(ProviderError, match=r"costs \$2\.000 an hour"),
        renter.rented(offered(renter), disk=50) as rental,
    ):
        renter.wait_until_running(rental)
        (one,) = vast.running()
        monthly = vast._charges

        def dearer(query: dict[str, list[str]]) -> tuple[int, Any]:
            status, body = monthly(query)
            for row in body["results"]:
                row["items"] = [{"type": "gpu", "description": "2.000 hours at $2.000/hour"}]
            return status, body

        vast._charges = dearer  # type: ignore[method-assign]
        work(renter, vast, rental, 30)
    assert one.gone_at is not None


def test_random_prices_and_faults_never_pass_the_cap(
    use: Callable[[FakeVast], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prices rise at random moments, the line is bad, the client dies: what is billed stays under the cap."""
    ends: dict[str, int] = {}
    provider = None
    caps = Caps(price=4.0, cost=0.25, hours=6.0)  # half an hour at the price that is offered
    for seed in range(SEQUENCES):
        generator = random.Random(seed)
        monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / f"state-{seed}"))
        vast = FakeVast(SimulatedClock(), offers=[an_offer(1, 0.5)])
        use(vast)
        provider = provider or Vast(KEY, url=vast.url, timeout=5.0)
        provider.connection.clock = vast.clock
        renter = Renter(provider, caps, clock=vast.clock, start_seconds=400)
        vast.faults = random_faults(generator, generator.choice([0.0, 0.2]), {})
        if generator.random() < 0.5:
            vast.clock.dies_at = vast.clock.time + generator.uniform(100, 2000)
        changes = {
            generator.randrange(30): generator.choice([0.45, 0.503, 0.6, 2.0, 12.0, None, float("nan")])
        }
        end = "done"
        try:
            with renter.rented(offered(renter), disk=50) as rental:
                renter.wait_until_running(rental)
                (one,) = vast.running()
                one.busy = True
                line = Line(one, vast.clock)
                watch = Watch(renter, line, rental)
                for minute in range(generator.choice([10, 60])):
                    one.price = changes.get(minute, one.price)
                    line.cut = generator.random() < 0.3
                    watch.look()
                    watch.require()
                    vast.clock.sleep(60)
        except PowerLoss:
            end = "power lost"
        except LorasmithError as error:
            end = "price" if "an hour" in str(error) or "no price" in str(error) else "other"
        ends[end] = ends.get(end, 0) + 1
        vast.clock.dies_at = None
        for minute in range(60):  # whoever is left: the watchdog alone
            for one in vast.running():
                one.price = changes.get(minute, one.price)
            vast.clock.advance(60)
        assert not vast.running()
        for one in vast.instances.values():
            assert vast.cost(one) <= caps.cost + LATE * one.rate, seed
    print(f"{SEQUENCES} sequences: {ends}")
    assert set(ends) >= {"done", "power lost", "price"}
