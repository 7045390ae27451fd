"""Runs on a rented machine, and destroys it with a key that is good for this machine alone.

Sent with the request to rent, so that it is there before anybody has connected. Destroying ends all costs;
a machine that is merely stopped goes on billing its disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import urllib.request
from pathlib import Path


def reason(now: float, began: float, deadline: float, grace: float, beat: float, busy: bool) -> str | None:
    """Why the machine should be destroyed now; None to keep it. All times in seconds."""
    if now >= deadline:
        return "the hours or dollars are used up"
    if not busy and now - max(began, beat) > grace:
        return "nobody has been here for a while"
    return None


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


def destroy(url: str, number: str, key: str) -> None:
    """Ask the provider; whatever goes wrong is asked again the next time round."""
    request = urllib.request.Request(f"{url}/api/v0/instances/{number}/", method="DELETE")
    request.add_header("Authorization", "Bearer " + key)
    try:
        urllib.request.urlopen(request, timeout=30).read()
    except OSError as error:
        print(error, flush=True)


def main(url: str, hours: str, grace: str, place: str) -> None:
    """Watch until the machine is gone, and this program with it."""
    folder = Path(place).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    start = folder / "began"
    try:  # a machine that was restarted gets no more time
        began = float(start.read_text())
    except (OSError, ValueError):
        began = time.time()
        start.write_text(str(began))
    (folder / "watchdog.pid").write_text(str(os.getpid()))
    while True:
        beat, busy = look(folder)
        why = reason(time.time(), began, began + float(hours) * 3600, float(grace), beat, busy)
        if why:
            print(why, flush=True)
            destroy(url, os.environ["CONTAINER_ID"], os.environ["CONTAINER_API_KEY"])
        time.sleep(15)


if __name__ == "__main__":
    main(*sys.argv[1:])
