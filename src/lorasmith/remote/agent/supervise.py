"""Runs a job on the other machine, detached from any connection: install, fetch models, run the command.

Sent like `requests.py`, and like it needs Python 3.11 and nothing else. Its state is in `state.json`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_STOP_SECONDS = 30.0
"""How long a stopped command may take to clean up before it is killed."""


def write_state(job: Path, **state: Any) -> None:
    """Where the job stands, whole or not at all."""
    temporary = job / f"state.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(state))
    temporary.replace(job / "state.json")


class Stopped(BaseException):
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
        raise Stopped

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
            fetch_models(plan, [*launch[:1], "-c"], run, more)
        enter("running")
        code = run([*launch, *plan["command"]], **more)
        if code >= 128:
            reason = f"the command was killed by signal {code - 128}"
    except Stopped:
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


# As a local command fetches a model: only what is needed, no pickle, each file against its hash.
_FETCH = """import sys
from lorasmith.errors import LorasmithError
from lorasmith.hub.cache import HubModel
from lorasmith.hub.download import download
from lorasmith.progress import silent
repository, revision = sys.argv[1:]
try:
    print(download(HubModel(repository, revision or "main"), silent, adapters=True))
except LorasmithError as error:
    sys.exit(str(error))
"""


def fetch_models(plan: dict[str, Any], python: list[str], run: Any, more: dict[str, Any]) -> None:
    """Fetch each model from the hub, once for all jobs, and link it to its place in this one's folder."""
    environment = {**more.get("env", os.environ), "HF_HUB_CACHE": plan["cache"]}
    for model in plan["hub"]:
        place, told = Path(model["remote"]), Path("hub.path")
        place.parent.mkdir(parents=True, exist_ok=True)
        wanted = [model["repository"], model["revision"] or ""]
        with told.open("wb") as out:
            code = run([*python, _FETCH, *wanted], stdout=out, env=environment)
        must(code, f"fetching {model['repository']}")
        if place.is_symlink():
            place.unlink()
        place.symlink_to(told.read_text().splitlines()[-1])


def must(code: int, doing: str) -> None:
    if code:
        raise RuntimeError(f"{doing} failed with exit code {code}; the log says why")


if __name__ == "__main__" and len(sys.argv) == 3:
    # The number is that of the inherited lock: it stays open, and held, as long as this process lives.
    supervise(Path(sys.argv[1]))
