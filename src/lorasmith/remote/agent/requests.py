"""What runs on the other machine: sent there with `file_store.py`, needs Python 3.11 and nothing else.

Each request is one JSON object and gives lines `@lorasmith {...}`. The job itself runs detached from the
connection, under `supervise.py`, which holds the job folder's lock and writes its state to `state.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lorasmith.remote.agent.file_store import (  # sent along, under this name
    arrived,
    manifest,
    prepare_folders,
    verify,
)

MARK = "@lorasmith "
_BLOCK = 256 << 10
_STOP_SECONDS = 40.0
"""How long to wait for the end of a stopped command; its supervisor kills it after 30."""
_BEGIN_SECONDS = 10.0
"""How long a supervisor may take to its first word."""


def tell(answer: dict[str, Any]) -> None:
    print(MARK + json.dumps(answer), flush=True)


def check(request: dict[str, Any]) -> dict[str, Any]:
    """What this machine has, and lorasmith's folder on it."""
    folder = Path(request["folder"]).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    space = os.statvfs(folder)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "folder": str(folder),
        "disk_free": space.f_bavail * space.f_frsize,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": gpus(),
        "rsync": shutil.which("rsync") is not None,
    }


def gpus() -> list[str]:
    """Name and memory of each NVIDIA GPU; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]


def lock(job: Path) -> int | None:
    """The job's lock, or None while somebody holds it."""
    handle = os.open(job / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def read_state(job: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((job / "state.json").read_text()))
    except (OSError, ValueError):
        return {}


def start(request: dict[str, Any]) -> dict[str, Any]:
    """Start the job detached from this connection; a job that runs already is left alone."""
    job = Path(request["job"])
    handle = lock(job)
    if handle is None:
        return {"started": False, **status(request)}
    script = job / "supervise.py"
    script.write_text(request["supervisor"])
    (job / "plan.json").write_text(json.dumps(request["plan"]))
    (job / "state.json").unlink(missing_ok=True)  # of an earlier attempt
    # The values of passed variables go from here into the process alone, never to the disk.
    environment = {**os.environ, **request["environment"]}
    with (job / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", str(script), str(job), str(handle)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=job,
            env=environment,
            start_new_session=True,
            pass_fds=[handle],
        )
    os.close(handle)
    until = time.monotonic() + _BEGIN_SECONDS
    while not read_state(job):
        if process.poll() is not None or time.monotonic() > until:
            raise OSError(f"the supervisor does not begin: see {job / 'log'}")
        time.sleep(0.02)
    return {"started": True}


def status(request: dict[str, Any]) -> dict[str, Any]:
    """Where the job stands; `lost` when its supervisor is gone without a word, as after a power cut."""
    job = Path(request["job"])
    if not job.is_dir():
        return {"phase": "absent"}
    state = read_state(job)
    if not state:
        return {"phase": "uploading"}
    phase = state["phase"]
    if phase != "ended":
        handle = lock(job)
        if handle is not None:
            os.close(handle)
            state = read_state(job)  # it may have ended in between
            phase = "ended" if state["phase"] == "ended" else "lost"
    log = job / "log"
    return {
        "phase": phase,
        "code": state.get("code"),
        "reason": state.get("reason", ""),
        "plan": state.get("plan"),
        "seconds": state.get("seconds"),
        "log_bytes": log.stat().st_size if log.exists() else 0,
    }


def follow(request: dict[str, Any]) -> dict[str, Any]:
    """The log from `offset` on as it grows, in pieces, until the job has ended or `seconds` are over."""
    log, offset = Path(request["job"]) / "log", request["offset"]
    until = time.monotonic() + request["seconds"]
    quiet = time.monotonic()
    while True:
        now = status(request)
        piece = b""
        if log.exists():
            with log.open("rb") as handle:
                handle.seek(offset)
                piece = handle.read(_BLOCK)
        if piece:
            offset += len(piece)
            tell({"log": piece.decode("latin-1"), "offset": offset})
            quiet = time.monotonic()
            continue
        if now["phase"] in ("absent", "ended", "lost") or time.monotonic() > until:
            return {"offset": offset, **now}
        if time.monotonic() - quiet > 5:
            tell({"offset": offset})  # fails, and so ends this process, when the connection is gone
            quiet = time.monotonic()
        time.sleep(request.get("pause", 0.5))


def stop(request: dict[str, Any]) -> dict[str, Any]:
    """Ask the command to stop, and wait until it has."""
    job = Path(request["job"])
    if status(request)["phase"] in ("installing", "fetching models", "running"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(read_state(job)["pid"], signal.SIGTERM)
        until = time.monotonic() + _STOP_SECONDS
        while status(request)["phase"] not in ("ended", "lost") and time.monotonic() < until:
            time.sleep(0.1)
    return status(request)


def beat(request: dict[str, Any]) -> dict[str, Any]:
    """Tell a rented machine's watchdog that somebody is there, and what the machine costs by their reading.

    Answers whether the watchdog lives, and what the machine has transferred by the watchdog's own count.
    """
    folder = Path(request["folder"]).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"heartbeat.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(request.get("told", {})))
    temporary.replace(folder / "heartbeat")
    received, sent, alive = 0, 0, False
    with contextlib.suppress(OSError, ValueError):
        alive = Path(f"/proc/{int((folder / 'watchdog.pid').read_text())}").is_dir()
    with contextlib.suppress(OSError, ValueError):
        received, sent = map(int, (folder / "traffic").read_text().split())
    return {"watchdog": alive, "received": received, "sent": sent}


_ALL = (check, prepare_folders, arrived, verify, start, status, follow, stop, manifest, beat)
REQUESTS = {function.__name__: function for function in _ALL}


def answer(request: dict[str, Any]) -> None:
    """Do what one request asks, and tell the result or why not."""
    try:
        tell({"ok": True, **REQUESTS[request["do"]](request)})
    except BrokenPipeError:
        os._exit(1)
    except OSError as error:
        tell({"ok": False, "errno": error.errno, "error": str(error)})
    except Exception as error:  # a broken connection is tried again, and this would be taken for one
        tell({"ok": False, "error": f"{type(error).__name__}: {error}"})
