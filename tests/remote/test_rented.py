"""A rented machine from the first contact to its end, whatever ends it; and what it cost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import ProviderError, RemoteError
from lorasmith.remote.rental.caps import Caps
from lorasmith.remote.rental.first_contact import open_transport
from lorasmith.remote.rental.provider import Instance
from lorasmith.remote.rental.rent import Renter
from lorasmith.remote.rental.vast import Vast
from lorasmith.remote.ssh import SshTransport
from lorasmith.remote.state import open_rentals, rental_at, rental_hosts, rentals
from tests.remote.jobs import start
from tests.remote.machines import SSHD, Machine, machine, make_key
from tests.remote.rented_machine import vast_for
from tests.remote.vast_server import KEY, FakeInstance, FakeVast, serve

pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="needs Debian's openssh-server and rsync")

# Stands in for `lorasmith run` there: as long as it is told, and with the price that it is given.
FAKE = """
import json, pathlib, sys, time
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
print("began", flush=True)
time.sleep(float(words["--seed"]) if "--seed" in words else 0)
out = pathlib.Path(words["--output"])
out.mkdir(parents=True)
stage = {"stage": "merge", "wall_seconds": 0.2, "cpu_seconds": 0.2, "peak_rss_bytes": 1, "started": "x"}
(out / "timing.json").write_text(json.dumps({"format": "lorasmith/timing/1", "hardware": {},
    "price_per_hour": float(words["--price-per-hour"]), "stages": [stage]}))
"""


@pytest.fixture(scope="module")
def use() -> Iterator[Callable[[FakeVast], None]]:
    with serve() as given:
        yield given


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "machine") as found:
        yield found


@pytest.fixture
def vast(use: Callable[[FakeVast], None], other: Machine, monkeypatch: pytest.MonkeyPatch) -> FakeVast:
    monkeypatch.setenv("LORASMITH_STATE", str(other.home.parent.parent / "state"))
    made = vast_for(other)
    use(made)
    return made


def meet(vast: FakeVast, said: list[str]) -> tuple[Renter, Callable[[], SshTransport]]:
    """A rental whose machine runs, and how to make its acquaintance."""
    provider = Vast(KEY, url=vast.url, clock=vast.clock, timeout=5.0)
    renter = Renter(provider, Caps(2.0, 3.0, 4.0), clock=vast.clock, say=said.append)
    rental = renter.rent(provider.offers("", 50)[0], disk=50)
    found: Instance = renter.wait_until_running(rental)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    return renter, lambda: open_transport(renter, rental, found, user=user)


def test_the_host_key_is_the_one_that_the_instances_log_tells(vast: FakeVast, other: Machine) -> None:
    said: list[str] = []
    _, contact = meet(vast, said)
    transport = contact()
    (rental,) = rentals()
    assert rental.host_keys == [other.fingerprint] and rental.host_key_from == "the instance's log"
    assert (rental.host, rental.port) == ("127.0.0.1", other.port)
    assert rental_at("127.0.0.1", other.port) == rental and rental_at("127.0.0.1", 1) is None
    assert any("as the machine's log" in line for line in said)
    # The machine at this address becomes another one: that is an error for the rest of the rental.
    make_key(other.home.parent / "changed")
    changed = (other.home.parent / "changed.pub").read_text().split()[:2]
    rental_hosts(rental.label).write_text(f"[127.0.0.1]:{other.port} {' '.join(changed)}\n")
    with pytest.raises(RemoteError, match="host key is not the known one"):
        transport.request({"do": "beat", "folder": "~/.lorasmith"})


def test_a_machine_with_another_key_than_its_log_tells_is_not_used(vast: FakeVast, other: Machine) -> None:
    make_key(other.home.parent / "another")
    vast.first_log = [f"lorasmith-host-key {make_key(other.home.parent / 'right')}"]
    renter, contact = meet(vast, [])
    with pytest.raises(RemoteError, match="this is another machine"):
        contact()
    (rental,) = rentals()
    assert rental.host_keys == [] and not rental_hosts(rental.label).exists()
    assert renter.give_back(rental).state == "gone"


def test_a_silent_log_leaves_the_first_contact_and_says_so(vast: FakeVast, other: Machine) -> None:
    vast.first_log = ["nothing of interest"]
    said: list[str] = []
    began = vast.clock.time
    _, contact = meet(vast, said)
    contact()
    (rental,) = rentals()
    assert rental.host_keys == [other.fingerprint] and rental.host_key_from == "first contact"
    assert any("taken on trust" in line and other.fingerprint in line for line in said)
    assert vast.clock.time - began >= 120  # it was waited for


def test_a_machine_without_its_watchdog_is_not_used(
    vast: FakeVast, other: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.remote.rental.first_contact.SSH_SECONDS", 10.0)
    _, contact = meet(vast, [])
    (other.home / ".lorasmith" / "watchdog.pid").unlink()
    with pytest.raises(ProviderError, match="the watchdog does not run"):
        contact()


def variables(vast: FakeVast, name: str) -> dict[str, str]:
    state = Path(os.environ["LORASMITH_STATE"]).parent / name
    return {**os.environ, "LORASMITH_STATE": str(state), "LORASMITH_VAST_URL": vast.url, "VAST_API_KEY": KEY}


@pytest.fixture
def shim(other: Machine) -> Path:
    """An interpreter there whose lorasmith is the fake above."""
    code, found = other.home / "fake.py", other.home / "python-with-fake"
    code.write_text(FAKE)
    found.write_text(
        f'#!/bin/sh\nif [ "$2" = lorasmith.cli.main ]; then shift 2; exec {sys.executable} {code} "$@"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    found.chmod(0o755)
    return found


def a_run(shim: Path, folder: Path, seconds: float) -> list[str]:
    """`lorasmith remote run --vast … -- run …` with models of one file each."""
    for name in ("base", "adapter"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text("{}")
    (folder / "t.jsonl").write_text("{}\n")
    rented = ["--vast", "num_gpus=1", "--max-cost", "1", "--disk", "30", "--remote-python", str(shim)]
    paths = [
        f"--{name.replace('_', '-')}={folder / place}"
        for name, place in (
            ("base", "base"),
            ("adapter", "adapter"),
            ("test_set", "t.jsonl"),
            ("output", "run"),
        )
    ]
    command = ["run", *paths, "--seed", f"{seconds:g}"]
    return [sys.executable, "-m", "lorasmith.cli.main", "remote", "run", *rented, "--", *command]


def test_what_a_rented_run_cost_is_in_its_folder(vast: FakeVast, shim: Path, tmp_path: Path) -> None:
    environment = variables(vast, "state")
    done = subprocess.run(
        a_run(shim, tmp_path, 0), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    assert json.loads((run / "timing.json").read_text())["price_per_hour"] == 0.8
    (rental,) = json.loads((run / "rentals.json").read_text())["rentals"]
    assert rental["state"] == "gone" and rental["price_per_hour"] == 0.8 and rental["max_cost"] == 1.0
    # 30 GB at $0.15 a month of 730 hours; 0.65 hours at $0.80, and next to no traffic, were planned.
    assert rental["disk_per_hour"] == pytest.approx(30 * 0.15 / 730)
    assert rental["planned"] == pytest.approx(0.52, abs=0.001)
    shown = subprocess.run(
        [sys.executable, "-m", "lorasmith.cli.main", "costs", str(run)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stdout + shown.stderr
    hours = (rental["gone_at"] - rental["asked_at"]) / 3600
    traffic = (rental["sent_bytes"] * 0.002 + rental["received_bytes"] * 0.001) / 1e9
    dollars = hours * 0.8 + traffic
    assert "renting, installing, copying" in shown.stdout and "traffic" in shown.stdout
    assert f"Planned: $0.52   actual: ${dollars:.2f}" in shown.stdout
    assert f"Within budget: ${dollars:.2f} of $1.00" in shown.stdout


def test_by_hand_up_commands_and_down(vast: FakeVast, other: Machine, shim: Path, tmp_path: Path) -> None:
    """As the guide shows: no key, no fingerprint, no price is typed again for a machine that `up` rented."""
    environment = variables(vast, "state")

    def typed(*words: str) -> str:
        command = [sys.executable, "-m", "lorasmith.cli.main", "remote", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    up = typed("up", "--query", "num_gpus=1", "--max-cost", "1")
    address = re.search(r"remote run --host (\S+) ", up)
    label = re.search(r"remote down (\S+)", up)
    assert address and label and len(vast.running()) == 1
    command = a_run(shim, tmp_path, 0)
    place = command.index("--vast")
    command[place : place + 6] = ["--host", address[1]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "timing.json").read_text())["price_per_hour"] == 0.8
    assert "exit code 0" in typed("status")
    assert "began" in typed("logs")
    assert str(vast.running()[0].id) in typed("list")
    down = typed("down", label[1])
    assert f"{label[1]}: gone" in down and "for traffic" in down and not vast.running()
    (rental,) = json.loads((tmp_path / "run" / "rentals.json").read_text())["rentals"]
    assert rental["label"] == label[1] and rental["planned"] is None
    for path in (tmp_path / "state").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_up_gives_back_what_cannot_be_used(vast: FakeVast, other: Machine) -> None:
    """The machine has another key than its log tells: nothing is left of it."""
    vast.first_log = [f"lorasmith-host-key SHA256:{'A' * 43}"]
    done = subprocess.run(
        [sys.executable, "-m", "lorasmith.cli.main", "remote", "up", "--max-cost", "1"],
        env=variables(vast, "state"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "this is another machine" in done.stderr, done.stdout + done.stderr
    assert len(vast.bought) == 1 and not vast.running()


def test_every_ending_destroys_the_machine(
    vast: FakeVast, other: Machine, shim: Path, tmp_path: Path
) -> None:
    """Ctrl-C, Ctrl-C again while it cleans up, SIGTERM, and a computer without power that comes back."""
    began: dict[str, subprocess.Popen[str]] = {}
    for name in ("interrupted", "terminated", "without power"):
        began[name] = start(
            a_run(shim, tmp_path / name, 300),
            env=variables(vast, name),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    heard = {name: _until_it_began(process) for name, process in began.items()}
    assert len(vast.running()) == 3, heard
    began["interrupted"].send_signal(signal.SIGINT)
    began["terminated"].send_signal(signal.SIGTERM)
    began["without power"].kill()
    for number in (signal.SIGINT, signal.SIGTERM):  # impatience must not cost money
        time.sleep(0.5)
        began["interrupted"].send_signal(number)
    ended = {name: process.communicate(timeout=60)[0] for name, process in began.items()}
    assert began["interrupted"].returncode == 130, ended
    assert began["terminated"].returncode == 143, ended
    for name in ("interrupted", "terminated"):
        assert "destroyed, and confirmed to be gone" in ended[name], ended[name]
        assert re.search(r"(interrupted|terminated); give the same command again", ended[name])
    assert "destroying the machine first" in ended["interrupted"]
    assert len(vast.running()) == 1  # nobody could do anything for this one
    reaped = subprocess.run(
        [sys.executable, "-m", "lorasmith.cli.main", "remote", "reap"],
        env=variables(vast, "without power"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "gone" in reaped.stdout, reaped.stdout + reaped.stderr
    assert not vast.running() and len(vast.bought) == 3
    # Gone is what the provider's list has shown twice after the last request to destroy.
    last = max(place for place, line in enumerate(vast.seen) if line.startswith("DELETE"))
    assert sum("GET /api/v1/instances" in line for line in vast.seen[last:]) >= 2
    assert not open_rentals()
    for state in (other.home / ".lorasmith" / "jobs").glob("*/state.json"):  # what a real end takes with it
        os.kill(json.loads(state.read_text())["pid"], signal.SIGTERM)


@pytest.mark.parametrize("moment", ["the answer to the purchase is under way", "the machine starts"])
def test_a_computer_that_dies_while_it_rents_leaves_what_reap_needs(
    vast: FakeVast, shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """SIGKILL: nothing can be cleaned up. What is on disk from before the request is enough."""
    buying = moment.startswith("the answer")
    killed = threading.Event()
    buy = vast.buy

    def slowly(offer: int, body: dict[str, Any]) -> FakeInstance:
        bought = buy(offer, body)
        killed.wait(60)
        return bought

    if buying:
        monkeypatch.setattr(vast, "buy", slowly)
    vast.faults = lambda kind: ""  # no machine comes up by itself
    environment = variables(vast, "state")
    process = start(a_run(shim, tmp_path, 300), env=environment, stderr=subprocess.STDOUT)
    until = time.monotonic() + 60
    while not vast.bought or not (buying or any(one.state == "rented" for one in rentals())):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    killed.set()
    (rental,) = rentals()
    assert (rental.state, rental.instance is None) == ("asked" if buying else "rented", buying)
    assert len(vast.running()) == 1
    reaped = subprocess.run(
        [sys.executable, "-m", "lorasmith.cli.main", "remote", "reap"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"{rental.label}: gone" in reaped.stdout, reaped.stdout + reaped.stderr
    assert not vast.running() and len(vast.bought) == 1 and not open_rentals()


def _until_it_began(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    heard = ""
    for line in process.stdout:
        heard += line
        if "began" in line:
            return heard
    raise AssertionError(f"it ended before it began:\n{heard}")
