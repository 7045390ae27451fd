"""What runs on a rented machine: when it destroys it, and what it writes into its log."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorasmith.remote.agent import requests, watchdog
from lorasmith.remote.rental.job import _PRINT
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
        (7200, 7199, True, "used up"),
    ],
)
def test_when_the_watchdog_destroys(now: float, beat: float, busy: bool, expected: str | None) -> None:
    found = watchdog.reason(now, 0, 7200, 1800, beat, busy)
    assert found is None if expected is None else expected in str(found)


def test_dollars_that_traffic_takes_are_missing_for_hours() -> None:
    assert watchdog.deadline(100.0, 4.0, 3.0, 1.5, 0.0) == 100.0 + 2 * 3600
    assert watchdog.deadline(100.0, 4.0, 3.0, 1.5, 1.5) == 100.0 + 3600
    assert watchdog.deadline(100.0, 1.0, 3.0, 1.5, 0.0) == 100.0 + 3600
    assert watchdog.deadline(100.0, 4.0, 3.0, 1.5, 9.9) == 100.0


def test_traffic_is_that_of_the_outer_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watchdog.traffic(NET) == (5_000_000_001, 2_000_000_002)
    monkeypatch.setattr(requests.Path, "read_text", lambda self: NET)
    assert requests.traffic() == (5_000_000_001, 2_000_000_002)


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


def test_the_watchdog_as_it_is_sent_destroys_its_machine_with_its_own_key(tmp_path: Path) -> None:
    """The packed program, run by a shell as on the machine, against the same server over HTTP."""
    with serve() as use:
        vast = FakeVast(SimulatedClock(), offers=[an_offer(1)])
        use(vast)
        one = vast.buy(1, {"label": "lorasmith-x", "onstart": a_start()})
        there = tmp_path / "there"
        command = a_start(vast.url, hours=0.0, grace=1800, folder=str(there))
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
    assert "used up" in (tmp_path / "lorasmith-watchdog.log").read_text()
    assert float((there / "traffic").read_text()) >= 0.0
