"""What runs on a rented machine: when it destroys it, and what it writes into its log."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorasmith.remote.agent import requests
from lorasmith.remote.rental import watchdog
from lorasmith.remote.rental.caps import Caps
from lorasmith.remote.rental.first_contact import _PRINT
from lorasmith.remote.rental.rent import watchdog_program
from tests.remote.machines import make_key
from tests.remote.vast_server import KEY, FakeVast, SimulatedClock, a_start, an_offer, serve

# Of a container: the loopback counts nothing, two interfaces count both ways.
NET = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier
    lo: 999999 10 0 0 0 0 0 0 999999 10 0 0 0 0 0 0
  eth0:5000000000 10 0 0 0 0 0 0 2000000000 10 0 0 0 0 0 0
  eth1:      1 1 0 0 0 0 0 0 2 1 0 0 0 0 0 0
"""


@pytest.mark.parametrize(
    ("now", "beat", "busy", "expected"),
    [
        (100, 0, False, None),
        (1900, 0, False, "nobody has been here"),
        (1900, 1000, False, None),
        (3000, 1000, False, "nobody has been here"),
        (7000, 1000, True, None),
        (7200, 7199, True, "cap is reached"),
    ],
)
def test_when_the_watchdog_destroys(now: float, beat: float, busy: bool, expected: str | None) -> None:
    said = a_watch(hours=2.0, cost=100.0).reason(now, beat, busy)
    assert said == "" if expected is None else expected in said


def a_watch(*, hours: float, cost: float, price: float = 1.5) -> watchdog.Watchdog:
    """A watchdog since the first second, told by the command line that the client writes."""
    caps = Caps(price=2.0, cost=cost, hours=hours)
    return watchdog.Watchdog(0.0, tuple(watchdog.arguments(caps, price, 0.001, 0.002).split()))


@pytest.mark.parametrize(
    ("hours", "traffic", "over_after"), [(4.0, 0.0, 2.0), (4.0, 1.5, 1.0), (1.0, 0.0, 1.0), (4.0, 9.9, 0.0)]
)
def test_dollars_that_traffic_takes_are_missing_for_hours(
    hours: float, traffic: float, over_after: float
) -> None:
    """Three dollars at $1.50 an hour."""
    watch = a_watch(hours=hours, cost=3.0)
    watch.see_traffic(0, int(traffic / 0.002 * 1e9))
    assert not watch.reason(over_after * 3600 - 1, 0.0, True) or not over_after
    assert "cap is reached" in watch.reason(over_after * 3600 + 1, 0.0, True)


def test_traffic_is_that_of_the_outer_interfaces() -> None:
    assert watchdog.counters(NET) == (5_000_000_001, 2_000_000_002)


def test_a_beat_tells_what_the_machine_costs_and_brings_back_what_the_watchdog_counted(
    tmp_path: Path,
) -> None:
    request = {"do": "beat", "folder": str(tmp_path), "told": {"price": 1.51, "ahead": 0.25}}
    assert requests.beat(request) == {"watchdog": False, "received": 0, "sent": 0}
    (tmp_path / "watchdog.pid").write_text(str(os.getpid()))
    (tmp_path / "traffic").write_text("70 30")
    assert requests.beat(request) == {"watchdog": True, "received": 70, "sent": 30}
    watch = a_watch(hours=4.0, cost=3.0)
    watch.see_beat((tmp_path / "heartbeat").read_text())
    assert (watch.spending.price, watch.spending.ahead) == (1.51, 0.25)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    (tmp_path / "watchdog.pid").write_text(str(done.pid))
    assert not requests.beat(request)["watchdog"]  # a number that nobody has any more is no watchdog


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"instances": {"dph_total": 1.5}}, ""),
        ({"instances": {"dph_total": 1.51}}, ""),
        ({"instances": {"dph_total": 1.6}}, "costs $1.600 an hour, more than the $1.500 offered"),
        ({"instances": {"dph_total": float("nan")}}, "no price"),
        ({"instances": {"dph_total": -1.0}}, "no price"),
        ({"instances": {"dph_total": 0}}, "no price"),
        ({"instances": {"dph_total": None}}, "no price"),
        ({"instances": {"dph_total": "0.1"}}, "no price"),
        ({"instances": {"dph_total": True}}, "no price"),
        ({"instances": {}}, "no price"),
        ({"instances": None}, ""),  # nothing is said of its price: what is known holds
    ],
)
def test_the_watchdog_reads_its_own_price_and_ends_at_one_that_is_none(answer: object, expected: str) -> None:
    watch = a_watch(hours=4.0, cost=3.0)
    watch.see_answer(json.dumps(answer).encode(), "instances/dph_total")
    said = watch.reason(60.0, 0.0, True)
    assert said == "" if not expected else expected in said
    # Nothing that is heard later makes it forget.
    watch.see_answer(b'{"instances": {"dph_total": 1.5}}', "instances/dph_total")
    assert watch.reason(60.0, 0.0, True) == said


def test_a_clock_or_a_cap_that_is_no_number_ends_the_machine() -> None:
    assert a_watch(hours=float("nan"), cost=3.0).reason(60.0, 0.0, True)
    assert a_watch(hours=4.0, cost=float("nan")).reason(60.0, 0.0, True)
    watch = a_watch(hours=4.0, cost=3.0)
    watch.spending.began = float("nan")
    assert watch.reason(60.0, 0.0, True)


def test_fingerprints_are_those_of_ssh_keygen(tmp_path: Path) -> None:
    expected = make_key(tmp_path / "ssh_host_ed25519_key")
    (tmp_path / "ssh_host_rsa_key.pub").write_text("half a fi")
    (line,) = watchdog.fingerprints(tmp_path)
    assert line.endswith(f" {expected}")
    found = _PRINT.search(f"2026-11-22 {line}\r")
    assert found and found[1] == expected
    watchdog.tell([line], tmp_path / "log")
    assert (tmp_path / "log").read_text() == f"{line}\n"
    watchdog.tell([line], tmp_path / "no" / "log")  # a machine without such a log is watched all the same


@pytest.mark.parametrize(
    ("hours", "price", "reason"), [(0.0, 1.5, "cap is reached"), (4.0, 9.0, "costs $9.000 an hour")]
)
def test_the_watchdog_as_it_is_sent_destroys_its_machine_with_its_own_key(
    tmp_path: Path, hours: float, price: float, reason: str
) -> None:
    """The packed program, run by a shell as on the machine, against the same server over HTTP."""
    with serve() as use:
        vast = FakeVast(SimulatedClock(), offers=[an_offer(1)])
        use(vast)
        one = vast.buy(1, {"label": "lorasmith-x", "onstart": a_start()})
        there = tmp_path / "there"
        one.price = price
        command = a_start(vast.url, hours=hours, grace=1800, folder=str(there))
        command = command.replace("/root/", f"{tmp_path}/").replace("python3", sys.executable)
        assert command.rstrip().endswith("&")
        environment = {"PATH": os.environ["PATH"], "CONTAINER_ID": str(one.id), "CONTAINER_API_KEY": KEY}
        subprocess.run(["sh", "-c", command], env=environment, check=True, timeout=20)
        for _ in range(200):
            if one.gone_at is not None:
                break
            time.sleep(0.05)
        os.kill(int((there / "watchdog.pid").read_text()), 15)
    assert one.gone_at is not None
    assert reason in (tmp_path / "lorasmith-watchdog.log").read_text()
    assert len((there / "traffic").read_text().split()) == 2


def test_what_is_sent_needs_a_bare_python_of_years_ago() -> None:
    program = ast.parse(watchdog_program(), feature_version=(3, 8))
    imported = {name.name for one in ast.walk(program) if isinstance(one, ast.Import) for name in one.names}
    imported |= {str(one.module) for one in ast.walk(program) if isinstance(one, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
