"""`remote reap`: whatever the state folder holds and the provider answers, no machine is forgotten."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import LorasmithError
from lorasmith.remote.rental.caps import Caps
from lorasmith.remote.rental.rent import EndedRental, Renter
from lorasmith.remote.rental.vast import Vast
from lorasmith.remote.state import open_rentals, read_rentals, rentals, state_folder
from tests.remote.vast_server import KEY, FakeInstance, FakeVast, SimulatedClock, a_start, an_offer, serve

CAPS = Caps(price=2.0, cost=3.0, hours=4.0)
SEQUENCES = int(os.environ.get("LORASMITH_FAULT_SEQUENCES", "200"))
ODD: list[dict[str, Any]] = [
    {"id": None},
    {"id": "5x"},
    {"id": [1]},
    {"id": True},
    {"dph_total": "n/a"},
    {"dph_total": None},
    {"dph_total": float("nan")},
    {"label": None},
    {"label": 7},
    {"ssh_port": "n/a", "ports": None, "public_ipaddr": None},
    {"ports": {"22/tcp": [None]}},
    {"ports": {"22/tcp": "x"}},
    {"ports": 3},
    {"actual_status": ["loading"]},
]
"""What the entry of somebody else's instance may hold."""


@pytest.fixture(scope="module")
def use() -> Iterator[Callable[[FakeVast], None]]:
    with serve() as given:
        yield given


@pytest.fixture
def vast(use: Callable[[FakeVast], None]) -> FakeVast:
    made = FakeVast(SimulatedClock(), offers=[an_offer(1, 1.5), an_offer(2, 1.2)])
    use(made)
    return made


def renter_for(vast: FakeVast) -> Renter:
    return Renter(Vast(KEY, url=vast.url, clock=vast.clock, timeout=5.0), CAPS, clock=vast.clock)


def rent(renter: Renter, label: str) -> Path:
    """A rental that is on disk; the file."""
    renter.rent(renter.provider.offers("", 50)[0], disk=50, label=label)
    return state_folder() / "rentals" / f"{label}.json"


def someone_elses(vast: FakeVast) -> FakeInstance:
    return vast.buy(1, {"label": "my experiment", "onstart": a_start(hours=1e6, grace=1e9)})


def show_odd(vast: FakeVast, odd: dict[str, Any]) -> None:
    """An entry in every list that is not as it should be."""
    whole = vast._list

    def listed(query: dict[str, list[str]]) -> tuple[int, Any]:
        status, body = whole(query)
        if status == 200:
            entry = {"id": 999, "label": "someone", "actual_status": "running", "dph_total": 1.0}
            body["instances"].append({**entry, "ssh_host": "h", "ssh_port": 1, **odd})
            body["total_instances"] += 1
        return status, body

    vast._list = listed  # type: ignore[method-assign]


def exit_code(outcomes: list[EndedRental]) -> int:
    """As `remote reap` ends."""
    return int(any(outcome.state != "gone" for outcome in outcomes))


@pytest.mark.parametrize(
    "content", ["", "{", '{"format": "lorasmith/rental/99"}', "[" * 100_000, "\0\xff", "folder"]
)
def test_a_record_that_cannot_be_read_keeps_no_machine_running(vast: FakeVast, content: str) -> None:
    renter = renter_for(vast)
    damaged = state_folder() / "rentals" / "lorasmith-old.json"
    if content == "folder":
        damaged.mkdir()
    else:
        damaged.write_text(content)
    with renter.rented(renter.provider.offers("", 50)[0], disk=50) as rental:
        renter.wait_until_running(rental)
    assert not vast.running()  # the command itself ends its machine
    said: list[str] = []
    renter.say = said.append
    rent(renter, "lorasmith-aaaa")
    vast.clock.advance(200)
    outcomes = renter.reap()
    assert not vast.running()
    assert {outcome.label: outcome.state for outcome in outcomes} == {
        "lorasmith-aaaa": "gone",
        "lorasmith-old": "not seen",
    }
    assert exit_code(outcomes) == 1 and any("lorasmith-old.json" in line for line in said)


def test_the_machine_of_a_damaged_record_is_found_by_what_is_left_of_it(vast: FakeVast) -> None:
    renter = renter_for(vast)
    by_name, by_number = rent(renter, "lorasmith-aaaa"), rent(renter, "lorasmith-bbbb")
    by_name.write_bytes(b"")
    lost = next(one for one in vast.running() if one.label == "lorasmith-bbbb")
    by_number.write_bytes(by_number.read_bytes()[:250])
    assert f'"instance": {lost.id}' in by_number.read_text()
    lost.label = ""  # the provider has lost it
    other = someone_elses(vast)
    outcomes = renter_for(vast).reap()
    assert vast.running() == [other] and exit_code(outcomes) == 0
    # Out of the way, and kept for whoever wants to know what it was.
    assert renter_for(vast).reap() == [] and by_name.with_suffix(".unreadable").exists()


def test_a_record_that_names_somebody_elses_machine_harms_nobody(vast: FakeVast) -> None:
    other = someone_elses(vast)
    renter = renter_for(vast)
    ours = rent(renter, "lorasmith-aaaa")
    text = ours.read_text()
    folder = ours.parent
    for name, label in (("empty.json", ""), ("other.json", "my experiment"), ("up.json", "../../../x")):
        (folder / name).write_text(text.replace("lorasmith-aaaa", label).replace("5001", str(other.id)))
    (folder / "lorasmith-cccc.json").write_text(f'{{"instance": {other.id}')
    vast.clock.advance(200)
    renter_for(vast).reap()
    assert vast.running() == [other]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_an_odd_entry_in_the_list_keeps_nothing_running(vast: FakeVast, odd: dict[str, Any]) -> None:
    show_odd(vast, odd)
    renter = renter_for(vast)
    with renter.rented(renter.provider.offers("", 50)[0], disk=50) as rental:
        assert renter.wait_until_running(rental).host
    assert not vast.running() and [one.state for one in rentals()] == ["gone"]
    vast.faults = lambda kind: "lost after" if kind == "create" else ""  # then nothing but the list can tell
    with renter.rented(renter.provider.offers("", 50)[0], disk=50) as rental:
        assert renter.wait_until_running(rental).host
    assert not vast.running() and {one.state for one in rentals()} == {"gone"}


def test_an_instance_of_ours_without_a_number_is_never_called_gone(vast: FakeVast) -> None:
    renter = renter_for(vast)
    rent(renter, "lorasmith-aaaa")
    show_odd(vast, {"id": None, "label": "lorasmith-aaaa"})
    (outcome,) = renter.reap()
    assert outcome.state == "may run" and "lorasmith-aaaa" in outcome.line
    assert not vast.running()  # what has a number is destroyed all the same


def test_one_machine_that_cannot_be_confirmed_keeps_no_other_waiting(vast: FakeVast) -> None:
    renter = renter_for(vast)
    rent(renter, "lorasmith-aaaa")
    rent(renter, "lorasmith-bbbb")
    first, second = vast.running()
    answer, began = vast.answer, vast.clock.time

    def stubborn(method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (500, {}) if f"/instances/{first.id}" in path else answer(method, path, body)

    vast.answer = stubborn  # type: ignore[method-assign]
    outcomes = {outcome.label: outcome for outcome in renter.reap()}
    assert second.gone_at is not None and second.gone_at - began < 600
    assert outcomes["lorasmith-bbbb"].state == "gone"
    assert outcomes["lorasmith-aaaa"].state == "may run"
    assert str(first.id) in outcomes["lorasmith-aaaa"].line and exit_code(list(outcomes.values())) == 1


@pytest.mark.parametrize("how", ["removed", "a file", "full"])
def test_a_state_folder_that_is_lost_while_a_machine_is_rented_keeps_nothing_running(
    vast: FakeVast, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    renter = renter_for(vast)
    said: list[str] = []
    renter.say = said.append
    with renter.rented(renter.provider.offers("", 50)[0], disk=50) as rental:
        renter.wait_until_running(rental)
        shutil.rmtree(state_folder())
        if how == "a file":
            Path(os.environ["LORASMITH_STATE"]).write_text("")
        if how == "full":

            def full(path: Path, record: object) -> None:
                raise LorasmithError("the disk is full", where=path)

            monkeypatch.setattr("lorasmith.remote.state.write_record", full)
    assert not vast.running()
    assert any("confirmed to be gone" in line for line in said)
    assert how == "removed" or any("cannot write down" in line for line in said)


def test_where_nothing_can_be_written_down_nothing_is_rented(vast: FakeVast) -> None:
    renter = renter_for(vast)
    offer = renter.provider.offers("", 50)[0]
    Path(os.environ["LORASMITH_STATE"]).write_text("")
    with pytest.raises(LorasmithError), renter.rented(offer, disk=50):
        pass
    assert not vast.bought


def test_hundreds_of_states_and_faults_leave_nothing_running_that_is_not_told(
    use: Callable[[FakeVast], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Vast(KEY, url=_fresh(use).url, timeout=5.0)
    endings: dict[str, int] = {}
    for seed in range(SEQUENCES):
        monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / f"state-{seed}"))
        _one_state(_fresh(use), provider, random.Random(seed), endings)
    print(f"{SEQUENCES} states: {endings}")
    assert set(endings) >= {"all gone", "told, exit 1"}


def _fresh(use: Callable[[FakeVast], None]) -> FakeVast:
    made = FakeVast(SimulatedClock(), offers=[an_offer(1, 1.5)])
    use(made)
    return made


def _one_state(vast: FakeVast, provider: Vast, generator: random.Random, endings: dict[str, int]) -> None:
    provider.connection.clock = vast.clock
    renter = Renter(provider, CAPS, clock=vast.clock, destroy_seconds=600)
    for number in range(generator.randrange(1, 5)):
        file = rent(renter, f"lorasmith-{number:04d}")
        _spoil(file, generator)
    others = [someone_elses(vast) for _ in range(generator.randrange(3))]
    for one in vast.running():  # long-lived, so that only `reap` can end them
        one.busy, one.watch.caps = True, Caps(1e9, 1e9, 1e9)
        if one not in others and generator.random() < 0.2:
            one.gone_at = vast.clock.time
    if generator.random() < 0.2:
        shutil.rmtree(state_folder())
    if generator.random() < 0.3:
        show_odd(vast, generator.choice(ODD))
    rate = generator.choice([0.0, 0.2, 0.5, 0.9])
    kinds = {
        "list": ["drop", "429", "500", "lost page"],
        "one": ["drop", "500"],
        "destroy": ["ignored", "500"],
    }
    vast.faults = lambda kind: generator.choice(kinds.get(kind, [""])) if generator.random() < rate else ""
    said: list[str] = []
    renter = Renter(provider, CAPS, clock=vast.clock, destroy_seconds=600, say=said.append)
    outcomes = renter.reap(everything=generator.random() < 0.5)
    left = [one for one in vast.running() if one not in others]
    told = "\n".join([outcome.line for outcome in outcomes])
    assert all(one.gone_at is None for one in others), "somebody else's machine was destroyed"
    if left:
        assert exit_code(outcomes) == 1
        unseen = [one for one in left if str(one.id) not in told and one.label not in told]
        # Where not one list came through, what has no record here cannot be named: that is told instead.
        assert not unseen or "what else may be rented" in told, told
    ending = "all gone" if not exit_code(outcomes) else "told, exit 1"
    endings[ending] = endings.get(ending, 0) + 1
    # On a good line, and told to take all of them, nothing is left.
    vast.faults = lambda kind: ""
    vast.clock.advance(200)
    Renter(provider, CAPS, clock=vast.clock).reap(everything=True)
    assert not [one for one in vast.running() if one not in others]
    assert not open_rentals()


def _spoil(file: Path, generator: random.Random) -> None:
    """What may have become of a record since it was written."""
    content = file.read_bytes()
    how = generator.randrange(10)
    if how == 0:
        file.write_bytes(content[: generator.randrange(len(content))])
    elif how == 1:
        file.write_bytes(b"")
    elif how == 2:
        file.write_bytes(content.replace(b"rental/1", b"rental/99"))
    elif how == 3:
        file.write_bytes(generator.randbytes(300))
    elif how == 4:
        file.write_bytes(b"[" * 20_000)
    elif how == 5:
        file.unlink()
        file.mkdir()
    elif how == 6:
        file.rename(file.with_name("notes.json"))
    elif how == 7:
        file.write_bytes(content.replace(b'"rented"', b'"asked"').replace(b'"instance": 5', b'"instance": 7'))


def test_reading_never_waits_for_a_pipe(vast: FakeVast) -> None:
    os.mkfifo(state_folder() / "rentals" / "lorasmith-pipe.json")
    whole, unreadable = read_rentals()
    assert not whole and [one.label for one in unreadable] == ["lorasmith-pipe"]
