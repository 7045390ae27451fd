"""The client of Vast.ai: keys, queries, pages, logs, charges."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorasmith.errors import InputError, ProviderError, UsageError
from lorasmith.remote.rental.caps import Caps
from lorasmith.remote.rental.provider import Charge, RefusedError
from lorasmith.remote.rental.rent import Renter
from lorasmith.remote.rental.vast import Vast, parse_query, read_key
from tests.remote.vast_server import KEY, FakeVast, SimulatedClock, a_start, an_offer, serve


@pytest.fixture(scope="module")
def use() -> Iterator[Callable[[FakeVast], None]]:
    with serve() as given:
        yield given


@pytest.fixture
def vast(use: Callable[[FakeVast], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVast:
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))
    made = FakeVast(SimulatedClock(), offers=[an_offer(1, 1.5), an_offer(2, 1.2)])
    use(made)
    return made


def client(vast: FakeVast) -> Vast:
    return Vast(KEY, url=vast.url, clock=vast.clock, timeout=5.0)


def test_no_offer_no_key_wrong_key(vast: FakeVast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vast.offers = []
    assert client(vast).offers("", 10) == []
    with pytest.raises(RefusedError, match="key is not accepted"):
        Vast("wrong", url=vast.url, clock=vast.clock).offers("", 10)
    monkeypatch.delenv("VAST_API_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(InputError, match="no key"):
        read_key()
    path = tmp_path / "vastai" / "vast_api_key"
    path.parent.mkdir()
    path.write_text("secret\n")
    path.chmod(0o644)
    with pytest.raises(InputError, match="others than its owner"):
        read_key()
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert read_key() == "secret"
    monkeypatch.setenv("VAST_API_KEY", "first")
    assert read_key() == "first"


def test_many_instances_come_in_pages(vast: FakeVast) -> None:
    body = {"label": "somebody else's", "onstart": a_start(hours=100, grace=1e6)}
    for _ in range(60):
        vast.buy(1, body)
    provider = client(vast)
    assert len(provider.instances()) == 60
    assert sum("instances" in line for line in vast.seen) == 3
    vast.faults = lambda kind: "lost page" if kind == "list" else ""
    with pytest.raises(ProviderError, match="pages are missing"):
        provider.instances()
    vast.faults = lambda kind: ""
    # Other people's labels are not touched.
    assert Renter(provider, Caps(2.0, 3.0, 4.0), clock=vast.clock).reap(everything=True) == []
    assert len(vast.running()) == 60


def test_queries() -> None:
    assert parse_query("gpu_name=H100_SXM num_gpus>=2 dph_total < 2.5 verified=true") == {
        "gpu_name": {"eq": "H100 SXM"},
        "num_gpus": {"gte": 2},
        "dph_total": {"lt": 2.5},
        "verified": {"eq": True},
    }
    assert parse_query("reliability>0.9 reliability<0.99") == {"reliability": {"gt": 0.9, "lt": 0.99}}
    with pytest.raises(UsageError, match="no condition"):
        parse_query("the cheapest one")


@pytest.mark.parametrize(
    "query",
    [
        "dph_total<nan",
        "dph_total<1e999",
        "dph_total>-inf",
        "gpu_name=\ud800",
        "gpu_name=a\x1b[2J",
        "type=bid",
        "order=x",
        "limit=1e308",
        "rentable=false",
        "rented=true",
        "allocated_storage=1",
        "a=b;rm -rf",
    ],
    ids=ascii,
)
def test_a_condition_that_cannot_be_asked_for_is_one_message(vast: FakeVast, query: str) -> None:
    with pytest.raises(UsageError):
        client(vast).offers(query, 50)
    assert not vast.seen


@pytest.mark.parametrize(
    "odd",
    [
        {"id": None},
        {"id": "x"},
        {"dph_total": "x"},
        {"dph_total": None},
        {"dph_total": float("nan")},
        {"dph_total": float("inf")},
        {"dph_total": -0.5},
        {"gpu_ram": [1]},
        {"num_gpus": "two"},
        {"inet_up_cost": -1},
        {"disk_space": float("nan")},
    ],
    ids=str,
)
def test_an_odd_offer_is_left_out_with_a_note_and_one_message_where_all_are(
    vast: FakeVast, odd: dict[str, object]
) -> None:
    provider, said = client(vast), list[str]()
    provider.say = said.append
    vast.offers = [an_offer(1, 1.5), an_offer(2, 1.2) | odd]
    assert [offer.id for offer in provider.offers("", 50)] == [1]
    assert said and said[0].startswith("note: 1 of 2 offers cannot be read")
    vast.offers = [an_offer(2, 1.2) | odd]
    with pytest.raises(ProviderError, match="none of the 1 offers can be read"):
        provider.offers("", 50)


@pytest.mark.parametrize("offers", [None, {}, "x", [None], [[1]], ["x"], [3]], ids=str)
def test_an_answer_to_a_search_that_holds_no_offers_is_one_message(vast: FakeVast, offers: object) -> None:
    vast.offers = offers  # type: ignore[assignment]
    with pytest.raises(ProviderError):
        client(vast).offers("", 50)


def test_the_log_of_an_instance_comes_from_where_the_provider_says(vast: FakeVast) -> None:
    one = vast.buy(1, {"label": "x", "onstart": a_start()})
    one.log = ["starting", "lorasmith-host-key SHA256:abc", "sshd: listening"]
    assert client(vast).log(one.id, "lorasmith-host-key") == ["lorasmith-host-key SHA256:abc"]
    vast.faults = lambda kind: "elsewhere" if kind == "log" else ""
    with pytest.raises(ProviderError, match="no address that can be trusted"):
        client(vast).log(one.id, "x")


def test_charges_are_summed_for_each_instance(vast: FakeVast) -> None:
    first, second = (vast.buy(1, {"label": "x", "onstart": a_start()}) for _ in range(2))
    vast.bills = {first.id: 0.9, second.id: 1.25}
    now = vast.clock.time
    bills = client(vast).charges(now - 10, now + 10)
    assert bills == {first.id: Charge(0.9, 1.5), second.id: Charge(1.25, 1.5)}
    assert sum("charges" in line for line in vast.seen) == 3  # a page each, that of a volume too
    assert client(vast).charges(now + 90_000, now + 100_000) == {}
