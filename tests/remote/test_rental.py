"""Rented machines: whatever fails, none is left running, none is rented twice, no cap is passed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lorasmith.errors import LorasmithError, ProviderError, UsageError
from lorasmith.remote.rental.caps import Caps, breach
from lorasmith.remote.rental.rent import Renter, spending_of
from lorasmith.remote.rental.vast import Vast
from lorasmith.remote.state import open_rentals, rentals
from tests.remote.vast_server import (
    KEY,
    FakeVast,
    PowerLoss,
    SimulatedClock,
    a_start,
    an_offer,
    random_faults,
    serve,
)

SEQUENCES = int(os.environ.get("LORASMITH_FAULT_SEQUENCES", "200"))
CAPS = Caps(price=2.0, cost=3.0, hours=4.0)
LATE = 5 / 60
"""Hours: a watchdog looks every 15 s, and on the worst line two of five requests to destroy fail: 20 in a row
do with a probability of 1e-8."""


@pytest.fixture(scope="module")
def use() -> Iterator[Callable[[FakeVast], None]]:
    with serve() as given:
        yield given


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))


@pytest.fixture
def vast(use: Callable[[FakeVast], None]) -> FakeVast:
    return here(use)


def here(use: Callable[[FakeVast], None]) -> FakeVast:
    """A provider that answers from now on."""
    made = FakeVast(SimulatedClock(), offers=[an_offer(1, 1.5), an_offer(2, 1.2)])
    use(made)
    return made


def renter_for(vast: FakeVast, caps: Caps = CAPS) -> Renter:
    provider = Vast(KEY, url=vast.url, clock=vast.clock, timeout=5.0)
    return Renter(provider, caps, clock=vast.clock)


def rent_and_work(renter: Renter, vast: FakeVast, work: Callable[[], None]) -> None:
    """What `remote run --vast` does: rent, wait, work, give back."""
    offer = renter.provider.offers("", 50)[0]
    with renter.rented(offer, disk=50) as rental:
        found = renter.wait_until_running(rental)
        assert found.host
        work()


def test_a_rental_from_offer_to_confirmed_end(vast: FakeVast) -> None:
    renter = renter_for(vast)
    said: list[str] = []
    renter.say = said.append
    rent_and_work(renter, vast, lambda: vast.clock.sleep(600))
    assert len(vast.bought) == 1 and not vast.running()
    (rental,) = rentals()
    assert (rental.state, rental.offer, rental.price_per_hour) == ("gone", 2, 1.2)
    assert "destroyed, and confirmed" in said[-1]
    instance = next(iter(vast.instances.values()))
    assert instance.watch.caps == CAPS  # the watchdog knows them
    assert instance.watch.spending.offered == 1.2
    assert instance.label == rental.label


def test_hundreds_of_faults_leave_nothing_running_and_rent_nothing_twice(
    use: Callable[[FakeVast], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[str, int] = {}
    endings: dict[str, int] = {}
    provider = Vast(KEY, url=here(use).url)  # one connection, and one set of certificates, for all
    for seed in range(SEQUENCES):
        monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / f"state-{seed}"))
        _one_sequence(use, provider, random.Random(seed), counted, endings)
    print(f"{SEQUENCES} sequences, {sum(counted.values())} faults: {counted}; endings: {endings}")
    assert len(counted) >= 20  # every kind of fault was met
    assert set(endings) >= {"done", "power lost", "ProviderError", "RuntimeError", "RefusedError"}


def _one_sequence(
    use: Callable[[FakeVast], None],
    provider: Vast,
    generator: random.Random,
    counted: dict[str, int],
    endings: dict[str, int],
) -> None:
    vast = FakeVast(SimulatedClock(), offers=[an_offer(1, 1.5)])
    use(vast)
    vast.faults = random_faults(generator, generator.choice([0.0, 0.2, 0.5]), counted)
    vast.listing_delay = generator.choice([0.0, 0.0, 45.0, 100.0])
    vast.starts_after = generator.choice([30.0, 300.0, None])
    vast.dead_status = generator.choice(["", "", "", "exited", "offline"])
    if generator.random() < 0.3:
        vast.clock.dies_at = vast.clock.time + generator.uniform(0, 4000)

    def work() -> None:
        how = generator.choice(["well", "well", "fails", "ssh never comes", "forever"])
        (one,) = vast.running()
        one.busy = how == "forever"
        for _ in range(int(generator.uniform(5, 40))):
            vast.clock.sleep(60)
            one.beat = vast.clock.time
            if how == "forever" and one.gone_at is not None:
                raise RuntimeError("the machine is gone")
        if how == "fails":
            raise RuntimeError("the command failed")
        if how == "ssh never comes":
            raise ProviderError("no ssh")

    provider.connection.clock = vast.clock
    renter = Renter(provider, CAPS, clock=vast.clock, start_seconds=400)
    ending = "done"
    try:
        rent_and_work(renter, vast, work)
    except PowerLoss:
        ending = "power lost"
    except (LorasmithError, RuntimeError) as error:
        ending = type(error).__name__
    endings[ending] = endings.get(ending, 0) + 1
    assert len(vast.bought) <= 1, "rented twice"
    if ending != "power lost" and vast.running():
        # Only what nobody could confirm may be left, and it stays on the list.
        assert [rental.label for rental in open_rentals()] == vast.bought
    elif ending != "power lost":
        assert all(rental.state in ("gone", "refused", "asked") for rental in rentals())
    vast.clock.dies_at = None
    if generator.random() < 0.5:  # the computer comes back and cleans up, over the same bad line
        vast.clock.advance(generator.uniform(0, 3000))
        with suppress(ProviderError):
            renter.reap()
    # The computer never comes back: the watchdogs alone, until the last cap is reached.
    vast.clock.advance(CAPS.hours * 3600 + CAPS.grace + 60)
    assert not vast.running(), "left running"
    for one in vast.instances.values():
        assert vast.cost(one) <= CAPS.cost + LATE * one.rate
    assert len(vast.bought) <= 1
    vast.faults = lambda kind: ""
    renter.reap()
    assert not open_rentals()


def test_an_answer_that_is_lost_is_looked_up_and_not_asked_again(vast: FakeVast) -> None:
    vast.faults = lambda kind: "lost after" if kind == "create" else ""
    vast.listing_delay = 90.0
    rent_and_work(renter_for(vast), vast, lambda: None)
    assert len(vast.bought) == 1
    assert sum("asks" in line for line in vast.seen) == 1
    assert not vast.running()


def test_a_purchase_that_nobody_can_find_is_not_repeated(vast: FakeVast) -> None:
    vast.faults = lambda kind: "lost after" if kind == "create" else ""
    vast.listing_delay = 3000.0
    renter = renter_for(vast)
    with pytest.raises(ProviderError, match="nobody can tell"):
        rent_and_work(renter, vast, lambda: None)
    assert sum("asks" in line for line in vast.seen) == 1
    assert [rental.state for rental in rentals()] == ["asked"]
    vast.clock.advance(1900)  # nobody came for half an hour: the watchdog has ended it
    assert not vast.running()


@pytest.mark.parametrize("fault", ["empty", "hidden", "lost page"])
def test_an_empty_or_partial_list_is_never_taken_for_gone(vast: FakeVast, fault: str) -> None:
    refusals = iter(["ignored"] * 3)
    vast.faults = lambda kind: {"list": fault, "destroy": next(refusals, "")}.get(kind, "")
    if fault == "lost page":  # pages that do not add up are an error, and nothing can be confirmed by one
        vast.faults = lambda kind: fault if kind == "list" and len(vast.seen) < 12 else ""
    rent_and_work(renter_for(vast), vast, lambda: None)
    assert not vast.running()
    assert [rental.state for rental in rentals()] == ["gone"]


def test_a_provider_that_does_not_answer_is_named_with_what_to_do(vast: FakeVast) -> None:
    vast.faults = lambda kind: "500" if kind in ("destroy", "list") else ""
    renter = renter_for(vast)
    renter.destroy_seconds = 600
    with pytest.raises(ProviderError, match="MAY STILL RUN") as raised:
        rent_and_work(renter, vast, lambda: None)
    assert "console.vast.ai/instances" in str(raised.value)
    (instance,) = vast.running()
    assert str(instance.id) in str(raised.value) and instance.label in str(raised.value)
    vast.faults = lambda kind: ""
    assert [outcome.state for outcome in renter.reap()] == ["gone"]
    assert not vast.running() and not open_rentals()


def test_the_label_and_the_rental_are_on_disk_before_the_request(vast: FakeVast) -> None:
    on_disk: list[str] = []

    def look(kind: str) -> str:
        if kind == "create":
            on_disk.extend(f"{rental.state} {rental.instance}" for rental in rentals())
        return ""

    vast.faults = look
    rent_and_work(renter_for(vast), vast, lambda: None)
    assert on_disk == ["asked None"]


def test_caps_on_price_are_checked_before_and_after(vast: FakeVast) -> None:
    renter = renter_for(vast, Caps(price=1.0, cost=3.0, hours=4.0))
    with pytest.raises(UsageError, match=r"costs \$1\.200 an hour"):
        rent_and_work(renter, vast, lambda: None)
    assert not vast.bought and not list(rentals())
    renter = renter_for(vast, Caps(price=1.3, cost=3.0, hours=4.0))

    def dearer(kind: str) -> str:
        for one in vast.running():
            one.price = 9.0
        return ""

    vast.faults = dearer
    with pytest.raises(ProviderError, match=r"costs \$9\.000 an hour, more than the \$1\.200 offered"):
        rent_and_work(renter, vast, lambda: None)
    assert not vast.running()


def test_reap_finds_what_another_computer_rented(vast: FakeVast) -> None:
    vast.buy(1, {"label": "lorasmith-0123456789ab", "onstart": a_start(hours=100, grace=1e6)})
    (told,) = renter_for(vast).reap()
    assert (told.state, told.label) == ("left alone", "lorasmith-0123456789ab")
    assert len(vast.running()) == 1 and str(vast.running()[0].id) in told.line
    assert [outcome.state for outcome in renter_for(vast).reap(everything=True)] == ["gone"]
    assert not vast.running()


def test_a_label_that_was_lost_is_set_again(vast: FakeVast) -> None:
    vast.loses_labels = True
    renter = renter_for(vast)
    with renter.rented(renter.provider.offers("", 50)[0], disk=50) as rental:
        assert renter.wait_until_running(rental).host
        assert [one.label for one in vast.running()] == [rental.label]
    assert not vast.running() and [rental.state for rental in rentals()] == ["gone"]


def test_traffic_counts_towards_the_cap_at_both_ends(vast: FakeVast) -> None:
    """At $1.20 an hour three dollars last 2.5 hours; with two dollars of traffic 50 minutes."""
    renter = renter_for(vast)
    rental = renter.rent(renter.provider.offers("", 50)[0], disk=50)
    assert not breach(CAPS, spending_of(rental), rental.asked_at + 2.4 * 3600)
    sent = renter.note(rental.label, sent_bytes=10**12)  # 1 TB at $0.002 a GB
    assert not breach(CAPS, spending_of(sent), rental.asked_at + 0.8 * 3600)
    assert "$2.00 of it for traffic" in breach(CAPS, spending_of(sent), rental.asked_at + 0.9 * 3600)
    assert "cap is reached" in breach(CAPS, spending_of(rental), rental.asked_at + 4 * 3600)
    (one,) = vast.running()
    one.traffic, one.busy = 2.0, True
    vast.clock.advance(0.8 * 3600)
    assert vast.running()
    vast.clock.advance(0.1 * 3600)
    assert not vast.running() and vast.cost(one) <= CAPS.cost + 0.02
