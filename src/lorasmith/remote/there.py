"""What runs on the other machine: sent over the connection, needs Python 3.11 and nothing else.

Each request is one JSON object and gives lines `@lorasmith {...}`. The job itself runs detached from the
connection, under a supervisor that holds the job folder's lock and writes its state to `state.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
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

MARK = "@lorasmith "
_BLOCK = 256 << 10
_STOP_SECONDS = 30.0
"""How long a stopped command may take to clean up before it is killed."""


def tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(MARK + json.dumps(answer) + "\n")
    sys.stdout.flush()


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
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]


def verify(request: dict[str, Any]) -> dict[str, Any]:
    """Which of the files are not what they should be; those are deleted, so that they are sent anew."""
    folder = Path(request["job"])
    wrong = []
    for name, size, sha256 in request["files"]:
        path = folder / name
        if path.is_file() and path.stat().st_size == size and hash_file(path) == sha256:
            continue
        path.unlink(missing_ok=True)
        wrong.append(name)
    return {"wrong": wrong}


def hash_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Make the folders of a job, and drop inputs of an earlier plan that are not wanted any more."""
    job = Path(request["job"])
    wanted = set(request["files"])
    for name in ("in", "out"):
        (job / name).mkdir(parents=True, exist_ok=True)
    for path in sorted((job / "in").rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(job).as_posix() not in wanted:
            path.unlink()
    for name in request["folders"]:
        (job / name).mkdir(parents=True, exist_ok=True)
    return {}


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


def write_state(job: Path, **state: Any) -> None:
    temporary = job / f"state.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(state))
    temporary.replace(job / "state.json")


def start(request: dict[str, Any]) -> dict[str, Any]:
    """Start the job detached from this connection; a job that runs already is left alone."""
    job = Path(request["job"])
    handle = lock(job)
    if handle is None:
        return {"started": False, **status(request)}
    script = job / "there.py"
    script.write_text(request["source"])
    (job / "plan.json").write_text(json.dumps(request["plan"]))
    write_state(job, phase="installing", plan=request["plan"]["sha256"], began=time.time())
    # The values of passed variables go from here into the process alone, never to the disk.
    environment = {**os.environ, **request["environment"]}
    with (job / "log").open("wb") as log:
        subprocess.Popen(
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
        found = status(request)
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
        if found["phase"] in ("absent", "ended", "lost") or time.monotonic() > until:
            return {"offset": offset, **found}
        if time.monotonic() - quiet > 5:
            tell({"offset": offset})  # fails, and so ends this process, when the connection is gone
            quiet = time.monotonic()
        time.sleep(request.get("pause", 0.5))


def stop(request: dict[str, Any]) -> dict[str, Any]:
    """Ask the command to stop, and wait until it has."""
    job = Path(request["job"])
    state = read_state(job)
    if status(request)["phase"] in ("installing", "fetching models", "running") and "pid" in state:
        with contextlib.suppress(ProcessLookupError):
            os.kill(state["pid"], signal.SIGTERM)
        until = time.monotonic() + _STOP_SECONDS + 10
        while status(request)["phase"] not in ("ended", "lost") and time.monotonic() < until:
            time.sleep(0.1)
    return status(request)


def manifest(request: dict[str, Any]) -> dict[str, Any]:
    """Size and SHA-256 of every file of the outputs, hidden ones left out."""
    job = Path(request["job"])
    files: list[tuple[str, int, str]] = []
    for name in request["outputs"]:
        place = job / name
        found = sorted(place.rglob("*")) if place.is_dir() else [place]
        for path in found:
            inner = path.relative_to(place).parts
            if path.is_file() and not any(part.startswith(".") for part in inner):
                relative = path.relative_to(job).as_posix()
                files.append((relative, path.stat().st_size, hash_file(path)))
    return {"files": files}


def forget(request: dict[str, Any]) -> dict[str, Any]:
    """Delete the job's folder; a running one is left alone."""
    job = Path(request["job"])
    if status(request)["phase"] in ("installing", "fetching models", "running"):
        return {"deleted": False}
    shutil.rmtree(job, ignore_errors=True)
    return {"deleted": True}


def beat(request: dict[str, Any]) -> dict[str, Any]:
    """Tell the watchdog of a rented machine that somebody is still there."""
    folder = Path(request["folder"]).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heartbeat").touch()
    return {"watchdog": (folder / "watchdog.pid").exists()}


REQUESTS = {
    function.__name__: function
    for function in (check, verify, prepare, start, status, follow, stop, manifest, forget, beat)
}


def answer(request: dict[str, Any]) -> None:
    """Do what one request asks, and tell the result or why not."""
    try:
        tell({"ok": True, **REQUESTS[request["do"]](request)})
    except BrokenPipeError:
        os._exit(1)
    except OSError as error:
        tell({"ok": False, "errno": error.errno, "error": str(error)})


class _Stopped(BaseException):
    """SIGTERM."""


def supervise(job: Path) -> None:
    """Install, fetch models, run the command; the state says how far it came and how it ended."""
    plan = json.loads((job / "plan.json").read_text())
    began = time.time()
    children: list[subprocess.Popen[bytes]] = []
    step = {"phase": "installing"}

    def enter(phase: str, **more: Any) -> None:
        step["phase"] = phase
        seconds = round(time.time() - began, 3)
        write_state(
            job, phase=phase, plan=plan["sha256"], pid=os.getpid(), began=began, seconds=seconds, **more
        )

    def on_term(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stopped

    def run(command: list[str], **more: Any) -> int:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, **more)
        children.append(child)
        code = child.wait()
        return 128 - code if code < 0 else code

    signal.signal(signal.SIGTERM, on_term)
    code, reason = 1, ""
    try:
        enter("installing")
        launch, more = install(plan, run)
        if plan["hub"]:
            enter("fetching models")
            fetch_models(plan["hub"], [*launch[:1], "-c"], run, more)
        enter("running")
        code = run([*launch, *plan["command"]], **more)
        if code >= 128:
            reason = f"the command was killed by signal {code - 128}"
    except _Stopped:
        code, reason = 143, "stopped"
        for child in children:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
    except (OSError, RuntimeError) as error:
        code, reason = 3, f"{step['phase']}: {error}"
    enter("ended", code=code, reason=reason)


def install(plan: dict[str, Any], run: Any) -> tuple[list[str], dict[str, Any]]:
    """The environment of this version of lorasmith, made once: how to launch it, and with which variables.

    With an interpreter of one's own only the wheel is unpacked, to be imported before anything else.
    """
    folder = Path(plan["env"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = plan["python"]
    launch = [own or str(folder / "bin" / "python"), "-m", "lorasmith.cli.main"]
    more = {"env": {**os.environ, "PYTHONPATH": str(folder)}} if own else {}
    with open(f"{folder}.lock", "w") as guard:  # noqa: PTH123 - the name has a suffix of its own
        fcntl.flock(guard, fcntl.LOCK_EX)
        if (folder / ".ready").exists():
            return launch, more
        shutil.rmtree(folder, ignore_errors=True)
        if own:
            must(run([own, "-m", "zipfile", "-e", plan["wheel"], str(folder)]), "unpacking lorasmith")
        else:
            must(run([sys.executable, "-m", "venv", str(folder)]), "making an environment (python3-venv?)")
            wanted = plan["wheel"] + (f"[{','.join(plan['extras'])}]" if plan["extras"] else "")
            pip = [launch[0], "-m", "pip", "install", "--disable-pip-version-check"]
            must(run([*pip, *plan["pip"], "-c", plan["constraints"], wanted]), "installing lorasmith")
        (folder / ".ready").touch()
    return launch, more


_FETCH = """import sys
from huggingface_hub import snapshot_download
repository, revision, folder = sys.argv[1:]
snapshot_download(repository, revision=revision or None, local_dir=folder)
"""


def fetch_models(models: list[dict[str, Any]], python: list[str], run: Any, more: dict[str, Any]) -> None:
    """Fetch each model from the hub to its place; goes on where an earlier attempt broke off."""
    for model in models:
        Path(model["remote"]).parent.mkdir(parents=True, exist_ok=True)
        wanted = [model["repository"], model["revision"] or "", model["remote"]]
        must(run([*python, _FETCH, *wanted], **more), f"fetching {model['repository']}")


def must(code: int, doing: str) -> None:
    if code:
        raise RuntimeError(f"{doing} failed with exit code {code}; the log says why")


if __name__ == "__main__" and len(sys.argv) == 3:
    # The number is that of the inherited lock: it stays open, and held, as long as this process lives.
    supervise(Path(sys.argv[1]))
