"""Run generated code where it can do no harm: another process, locked up, with limits and a deadline.

On Linux the program gets its own network (none), process table and file tree (Python read-only, an empty
temporary folder), an unprivileged user, no capabilities, limits on CPU, memory and file size, a clean
environment, and a system call filter that forbids processes, programs, sockets and signals. Where
namespaces are not permitted (many containers), Landlock and the filter take their place. Where neither is
there (other systems), nothing runs and the reason is given.

What it is not: a program that is written to fool its own tests can do so, since it runs in one process
with them. It can pass itself; it cannot reach out.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lorasmith


@dataclass(frozen=True)
class SandboxLimits:
    """What a program may use."""

    wall_seconds: float = 20.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    """Of address space."""
    file_bytes: int = 16 << 20
    """Of each file; also of the temporary folder as a whole where namespaces are permitted."""
    output_bytes: int = 1 << 16
    """So much of what it prints is kept; the rest is read and thrown away."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    finished: bool
    """True only when it ran to its end without an error."""
    reason: str
    output: str = ""
    lacking: list[str] = field(default_factory=list)
    """Protections that this machine cannot give; then nothing was run."""
    notes: list[str] = field(default_factory=list)


def run(program: str, limits: SandboxLimits | None = None, *, mode: str = "best") -> Outcome:
    """Run Python source text.

    `mode` is `best`; `user` is the way of a person who is not root (a user namespace), `landlock` the way
    where namespaces are not permitted.
    """
    limits = limits or SandboxLimits()
    if not sys.platform.startswith("linux"):
        reason = f"generated code is not run: {sys.platform} has no sandbox that lorasmith can use"
        return Outcome(False, reason, lacking=["network", "files"])
    with tempfile.TemporaryDirectory(prefix="lorasmith-") as scratch:
        token = secrets.token_hex(16)
        order = {**asdict(limits), "program": program, "token": token, "scratch": scratch, "mode": mode}
        said, output, timed_out = _supervise(order, limits)
    return _outcome(said, output, token, timed_out, limits)


@cache
def lacking() -> tuple[str, ...]:
    """What this machine cannot give; empty where generated code can be run. One trial, then remembered."""
    outcome = run("pass")
    return () if outcome.finished else tuple(outcome.lacking or [outcome.reason])


def _supervise(order: dict[str, Any], limits: SandboxLimits) -> tuple[bytes, bytes, bool]:
    """Start the launcher, feed it, read what it says and prints, end it at the deadline."""
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        _command(write_end),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[write_end],
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        cwd="/",
        start_new_session=True,
    )
    os.close(write_end)
    try:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
        return _collect(process.stdout.fileno(), read_end, limits)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        os.close(read_end)


def _command(result: int) -> list[str]:
    """The same Python without site packages; the environment variables given are all it has."""
    source = str(Path(lorasmith.__file__).parents[1])
    start = (
        f"import sys; sys.path.insert(0, {source!r}); from {__package__} import jail; "
        f"sys.path.pop(0); jail.main({result})"
    )
    return [os.path.realpath(sys.executable), "-s", "-S", "-P", "-c", start]


def _collect(printed: int, said: int, limits: SandboxLimits) -> tuple[bytes, bytes, bool]:
    deadline = time.monotonic() + limits.wall_seconds
    kept = {printed: b"", said: b""}
    with selectors.DefaultSelector() as selector:
        for handle in kept:
            selector.register(handle, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return kept[said], kept[printed], True
            for key, _ in selector.select(left):
                block = os.read(key.fd, 1 << 16)
                if block:
                    kept[key.fd] = (kept[key.fd] + block)[: limits.output_bytes]
                else:
                    selector.unregister(key.fd)
    return kept[said], kept[printed], False


def _outcome(said: bytes, output: bytes, token: str, timed_out: bool, limits: SandboxLimits) -> Outcome:
    facts: dict[str, Any] = {}
    for line in said.splitlines():
        with suppress(ValueError):
            told = json.loads(line)
            facts |= told if isinstance(told, dict) else {}
    text = output.decode("utf-8", "replace")
    lacks, notes = facts.get("lacking", []), facts.get("notes", [])
    if "lacking" not in facts:
        reason = "the sandbox could not be started: " + (text.strip().splitlines() or ["no message"])[-1]
        return Outcome(False, reason, text, lacking=["sandbox"])
    if lacks:
        reason = f"generated code is not run: this machine cannot give {', '.join(lacks)}"
        return Outcome(False, reason, text, lacks, notes)
    finished = facts.get("token") == token and not timed_out
    return Outcome(finished, _reason(facts, finished, timed_out, limits), text, [], notes)


def _reason(facts: dict[str, Any], finished: bool, timed_out: bool, limits: SandboxLimits) -> str:
    if finished:
        return "finished"
    if timed_out:
        return f"stopped after {limits.wall_seconds:g} s"
    if "error" in facts:
        return str(facts["error"])
    status = facts.get("status")
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"killed at a limit ({limits.cpu_seconds} s of CPU)"
    return f"ended early with status {status}"
