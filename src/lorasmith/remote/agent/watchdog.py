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

SIGN = "lorasmith-host-key"


def reason(now: float, began: float, deadline: float, grace: float, beat: float, busy: bool) -> str | None:
    """Why the machine should be destroyed now; None to keep it. All times in seconds."""
    if now >= deadline:
        return "the hours or dollars are used up"
    if not busy and now - max(began, beat) > grace:
        return "nobody has been here for a while"
    return None


def deadline(began: float, hours: float, dollars: float, price: float, traffic: float) -> float:
    """When the hours are over, or the dollars that traffic has left."""
    return began + 3600 * min(hours, max(0.0, dollars - traffic) / price)


def look(folder: Path) -> tuple[float, bool]:
    """When somebody was last here, and whether a job runs."""
    beat, busy = 0.0, False
    with contextlib.suppress(OSError):
        beat = (folder / "heartbeat").stat().st_mtime
    for state in folder.glob("jobs/*/state.json"):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(state.read_text())
            busy = busy or (found["phase"] != "ended" and Path(f"/proc/{found.get('pid', 0)}").exists())
    return beat, busy


def traffic(text: str) -> tuple[int, int]:
    """Bytes in and out through all interfaces but the loopback, of /proc/net/dev."""
    rows = [line.replace(":", " ").split() for line in text.splitlines()[2:]]
    return tuple(sum(int(row[i]) for row in rows if row[0] != "lo") for i in (1, 9))  # type: ignore[return-value]


def fingerprints(folder: Path) -> list[str]:
    """Of the ssh server's public keys, as ssh-keygen shows them."""
    found = []
    for file in sorted(folder.glob("ssh_host_*_key.pub")):
        with contextlib.suppress(OSError, ValueError, IndexError):
            digest = hashlib.sha256(base64.b64decode(file.read_text().split()[1])).digest()
            found.append(f"{SIGN} SHA256:{base64.b64encode(digest).decode().rstrip('=')}")
    return found


def tell(lines: list[str], log: Path) -> None:
    """Into the log of the container, which is what its first process prints."""
    with contextlib.suppress(OSError), log.open("w") as out:
        out.write("\n".join([*lines, ""]))


def destroy(url: str, key: str) -> None:
    """Ask the provider; whatever goes wrong is asked again the next time round."""
    request = urllib.request.Request(url, method="DELETE")
    request.add_header("Authorization", "Bearer " + key)
    try:
        urllib.request.urlopen(request, timeout=30).read()
    except OSError as error:
        print(error, flush=True)


def main(url: str, key: str, place: str, *numbers: str) -> None:
    """Watch until the machine is gone, and this program with it."""
    hours, grace, dollars, price, down, up = map(float, numbers)
    folder = Path(place).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    start = folder / "began"
    try:  # a machine that was restarted gets no more time
        began = float(start.read_text())
    except (OSError, ValueError):
        began = time.time()
        start.write_text(str(began))
    (folder / "watchdog.pid").write_text(str(os.getpid()))
    earlier, spent, first, told = 0.0, 0.0, None, 0
    with contextlib.suppress(OSError, ValueError):  # the counters of an earlier start are gone
        earlier = float((folder / "traffic").read_text())
    while True:
        with contextlib.suppress(OSError, ValueError, IndexError):
            now = traffic(Path("/proc/net/dev").read_text())
            first = first or now
            spent = earlier + ((now[0] - first[0]) * down + (now[1] - first[1]) * up) / 1e9
            (folder / "traffic").write_text(str(spent))
        lines = fingerprints(Path("/etc/ssh"))
        if len(lines) > told:  # the server makes its keys a moment after the start
            tell(lines, Path("/proc/1/fd/1"))
            told = len(lines)
        beat, busy = look(folder)
        end = deadline(began, hours, dollars, price, spent)
        why = reason(time.time(), began, end, grace, beat, busy)
        if why:
            print(why, flush=True)
            destroy(url, os.environ[key])
        time.sleep(15)


if __name__ == "__main__":
    main(*sys.argv[1:])
