"""Runs on a rented machine, and destroys it with a key that is good for this machine alone.

Sent with the request to rent, so that it is there before anybody has connected. Destroying ends all costs;
a machine that is merely stopped goes on billing its disk. It also writes the host key's fingerprint to the
machine's log, which the provider serves.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
import time
import urllib.request
from pathlib import Path

from lorasmith.remote.rental.caps import Caps, Spending, breach  # sent along, in front of this

SIGN = "lorasmith-host-key"
LOOK_SECONDS = 15.0


class Watchdog:
    """What the watchdog knows, and what it makes of it; reading and destroying are done outside."""

    def __init__(self, began: float, numbers: tuple[str, ...]) -> None:
        """`numbers`: as `arguments` writes them."""
        hours, grace, cost, highest, price, self.down, self.up = map(float, numbers)
        self.caps = Caps(highest, cost, hours, grace)
        self.spending = Spending(began, price, price)

    def reason(self, now: float, beat: float, busy: bool) -> str:
        """Why the machine should be destroyed now; nothing to keep it. All times in seconds."""
        if not busy and now - max(self.spending.began, beat) > self.caps.grace:
            return "nobody has been here for a while"
        return breach(self.caps, self.spending, now)

    def see_traffic(self, received: int, sent: int) -> None:
        """Bytes since the machine began."""
        self.spending.traffic = (received * self.down + sent * self.up) / 1e9

    def see_beat(self, text: str) -> None:
        """What the renting computer has read: it sees bills, which the machine's own key does not show."""
        told = json.loads(text or "{}")
        if "price" in told:
            self.spending.see_price(told["price"])
            self.spending.ahead = max(self.spending.ahead, float(told["ahead"]))

    def see_answer(self, answer: bytes, path: str) -> None:
        """The provider's word on this machine; an answer without the machine says nothing of its price."""
        one = json.loads(answer)
        *above, last = path.split("/")
        for name in above:
            one = one[name]
        if isinstance(one, dict):
            self.spending.see_price(one.get(last))


def arguments(caps: Caps, price: float, down: float, up: float) -> str:
    """Caps and the prices of the offer, as the watchdog takes them from its command line."""
    return (
        f"{caps.hours:.6f} {caps.grace:.0f} {caps.cost:.6f} {caps.price:.6f} {price:.6f} {down:.6f} {up:.6f}"
    )


def look(folder: Path) -> tuple[float, bool]:
    """When somebody was last here, and whether a job runs."""
    beat, busy = 0.0, False
    with contextlib.suppress(OSError):
        beat = (folder / "heartbeat").stat().st_mtime
    for state in folder.glob("jobs/*/state.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            job = json.loads(state.read_text())
            busy = busy or (job["phase"] != "ended" and Path(f"/proc/{job.get('pid', 0)}").exists())
    return beat, busy


def counters(text: str) -> tuple[int, int]:
    """Bytes in and out through all interfaces but the loopback, of /proc/net/dev."""
    rows = [line.replace(":", " ").split() for line in text.splitlines()[2:]]
    outer = [row for row in rows if row[0] != "lo"]
    return sum(int(row[1]) for row in outer), sum(int(row[9]) for row in outer)


def fingerprints(folder: Path) -> list[str]:
    """The ssh server's public keys as ssh-keygen shows them, each after a sign."""
    shown = []
    for file in sorted(folder.glob("ssh_host_*_key.pub")):
        with contextlib.suppress(OSError, ValueError, IndexError):
            digest = hashlib.sha256(base64.b64decode(file.read_text().split()[1])).digest()
            shown.append(f"{SIGN} SHA256:{base64.b64encode(digest).decode().rstrip('=')}")
    return shown


def tell(lines: list[str], log: Path) -> None:
    """Write into the log of the container, which is what its first process prints."""
    with contextlib.suppress(OSError), log.open("w") as out:
        out.write("\n".join([*lines, ""]))


def ask(method: str, url: str, key: str) -> bytes:
    """The provider's answer; nothing where there is none: the same is asked again the next time round."""
    request = urllib.request.Request(url, method=method)
    request.add_header("Authorization", "Bearer " + key)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read(1 << 20))
    except Exception as error:  # a malformed answer raises more than OSError
        print(error, flush=True)
        return b""


def main(url: str, key: str, price: str, place: str, *numbers: str) -> None:
    """Watchdog until the machine is gone, and this program with it."""
    folder = Path(place).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    start, count = folder / "began", folder / "traffic"
    try:  # a machine that was restarted gets no more time
        began = float(start.read_text())
    except (OSError, ValueError):
        began = time.time()
        start.write_text(str(began))
    (folder / "watchdog.pid").write_text(str(os.getpid()))
    watch = Watchdog(began, numbers)
    before, first, told = (0, 0), None, 0
    with contextlib.suppress(OSError, ValueError):  # the counters of an earlier start are gone
        received, sent = map(int, count.read_text().split())
        before = (received, sent)
    while True:
        # Whatever cannot be read leaves what is known; it must never end the watch itself.
        with contextlib.suppress(Exception):
            now = counters(Path("/proc/net/dev").read_text())
            first = first or now
            received, sent = (old + new - zero for old, new, zero in zip(before, now, first))  # noqa: B905
            watch.see_traffic(received, sent)
            count.write_text(f"{received} {sent}")
        with contextlib.suppress(Exception):
            watch.see_beat((folder / "heartbeat").read_text())
        with contextlib.suppress(Exception):
            watch.see_answer(ask("GET", url, os.environ[key]), price)
        lines = fingerprints(Path("/etc/ssh"))
        if len(lines) > told:  # the server makes its keys a moment after the start
            tell(lines, Path("/proc/1/fd/1"))
            told = len(lines)
        why = watch.reason(time.time(), *look(folder))
        if why:
            print(why, flush=True)
            ask("DELETE", url, os.environ.get(key, ""))
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
