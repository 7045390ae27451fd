"""A rented machine in small: the provider's API, and a real sshd as the instance."""

from __future__ import annotations

import threading

from tests.remote.machines import Machine
from tests.remote.vast_server import FakeVast, SimulatedClock, an_offer


def vast_for(other: Machine, price: float = 0.8) -> FakeVast:
    """A provider whose instances run at once, and are this machine; their log tells its host key."""
    vast = FakeVast(SimulatedClock(), offers=[an_offer(7, price)], port=other.port, starts_after=None)

    def start_at_once(kind: str) -> str:
        for one in vast.running():
            one.status = "running"
        return ""

    vast.faults = start_at_once
    vast.first_log = ["booting", f"lorasmith-host-key {other.fingerprint}"]
    authorized = other.home.parent / "authorized"
    lock = threading.Lock()

    def let_in(key: str) -> None:
        # Several rentals come at once: none may lose another's key, and sshd must never see half a file.
        with lock:
            beside = authorized.with_name("authorized.new")
            beside.write_text(f"{authorized.read_text().rstrip()}\n{key}\n")
            beside.chmod(0o600)
            beside.replace(authorized)

    vast.on_key = let_in
    (other.home / ".lorasmith").mkdir(exist_ok=True)
    (other.home / ".lorasmith" / "watchdog.pid").write_text("1")
    return vast
