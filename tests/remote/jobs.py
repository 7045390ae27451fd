"""Jobs for the other machine of the tests, and a stand-in for lorasmith there."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from lorasmith.records.remote import RemoteJob, Transfer
from lorasmith.remote.job import make_job
from lorasmith.remote.session import Session
from lorasmith.remote.ssh import Patience, SshTransport, parse_host
from tests.remote.machines import Machine

QUICK = Patience(attempts=6, first=0.05, longest=0.2)

# Stands in for lorasmith on the other machine.
FAKE = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
if words[0] == "copy":
    source, target = map(pathlib.Path, words[1:3])
    target.mkdir(parents=True, exist_ok=True)
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    (target / ".lock").touch()
    print("copied", flush=True)
elif words[0] == "slow":
    print("began", flush=True)
    pathlib.Path(words[1]).mkdir(parents=True, exist_ok=True)
    for count in range(int(words[2])):
        print(f"tick {count}", flush=True)
        time.sleep(0.1)
    pathlib.Path(words[1], "ticks").write_text(words[2])
elif words[0] == "environment":
    pathlib.Path(words[1]).parent.mkdir(parents=True, exist_ok=True)
    secret = os.environ["SECRET_TOKEN"]
    pathlib.Path(words[1]).write_text(str(len(secret)))
elif "--output" in words:
    given = dict(zip(words, words[1:]))
    print("began", flush=True)
    time.sleep(float(given.get("--seed", 0)))
    place = pathlib.Path(given["--output"])
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(words[0])
sys.exit(int(words[-1]) if words[0] == "fail" else 0)
"""


def connect(other: Machine, port: int | None = None, **more: object) -> SshTransport:
    host = parse_host(other.address.rsplit(":", 1)[0] + f":{port or other.port}")
    transport = SshTransport(host, identity=other.key, **more)  # type: ignore[arg-type]
    transport.trust(fingerprint=other.fingerprint)
    return transport


def job_for(
    other: Machine,
    command: list[str],
    python: str | None,
    inputs: list[Path],
    outputs: list[Path],
    **more: object,
) -> RemoteJob:
    sent = [Transfer(local=str(path), remote=f"in/{n}/{path.name}") for n, path in enumerate(inputs)]
    back = [Transfer(local=str(path), remote=f"out/{n}/{path.name}") for n, path in enumerate(outputs)]
    settings = {"folder": "~/.lorasmith", "extras": [], "python": python, **more}
    return make_job(other.address, other.port, command, sent, back, **settings)


def session_for(
    transport: SshTransport, job: RemoteJob, patience: Patience = QUICK, **more: object
) -> tuple[Session, list[str]]:
    said: list[str] = []
    settings = {"poll_seconds": 0.05, **more}
    return Session(transport, job, patience=patience, say=said.append, **settings), said  # type: ignore[arg-type]


def model_folder(folder: Path, size: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights of a model.bin").write_bytes(os.urandom(size))
    (folder / "config.json").write_text("{}")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def start(words: list[str], **options: Any) -> subprocess.Popen[str]:
    """A command that can be interrupted, even where these tests run in the background of a script.

    There a shell lets its commands ignore Ctrl-C, and what they start ignores it as well.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, **options)
    finally:
        signal.signal(signal.SIGINT, before)
