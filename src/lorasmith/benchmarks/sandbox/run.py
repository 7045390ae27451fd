"""Run generated code where it can do no harm: another process, locked up, with limits and a deadline.

On Linux the program gets its own network (none), process table and file tree (Python read-only, an empty
temporary folder of bounded size), an unprivileged user, no capabilities, limits on CPU, memory and files, a
clean environment, and a filter of system calls that lets through what computing needs. Where namespaces are
not permitted, as in many containers, Landlock (Linux 5.13) takes the place of the file tree: nothing can be
written then. `jail.PROMISES` says what a program is kept from; where one of these cannot be kept, nothing
runs and the reason is given, unless it is asked for. Other systems than Linux have no sandbox.

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lorasmith

_LINE_BYTES = 1 << 10


@dataclass(frozen=True)
class SandboxLimits:
    """How much a program may use."""

    wall_seconds: float = 20.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    """Address space that it may have."""
    file_bytes: int = 16 << 20
    """Size of a file, and of the temporary folder as a whole."""
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
    """Promises (`jail.PROMISES`) that this machine cannot keep; nothing was run then, unless it was to be."""
    notes: list[str] = field(default_factory=list)
    """How the program was locked up, and why the kernel refused what it refused."""


def run(
    program: str, limits: SandboxLimits | None = None, *, mode: str = "best", anyway: bool = False
) -> Outcome:
    """Run Python source text; with `anyway` even where promises cannot be kept.

    `mode` is `best`; `user` is the way of a person who is not root (a user namespace), `landlock` the way
    where namespaces are not permitted, and `landlock-1` the same with the first version of Landlock.
    """
    limits = limits or SandboxLimits()
    if not sys.platform.startswith("linux"):
        reason = f"generated code is not run: {sys.platform} has no sandbox that lorasmith can use"
        return Outcome(False, reason, lacking=["network", "files"])
    with tempfile.TemporaryDirectory(prefix="lorasmith-") as scratch:
        token = secrets.token_hex(16)
        order = {**asdict(limits), "program": program, "token": token, "scratch": scratch, "mode": mode}
        said, output, timed_out = _supervise({**order, "anyway": anyway}, limits)
    return _outcome(_Report.read(said), output, token, timed_out, limits, anyway)


_ANYWAY = ContextVar("run code anyway", default=False)


@contextmanager
def anyway(asked: bool) -> Iterator[None]:
    """Whether code runs in this block where promises cannot be kept: `--run-code-anyway`."""
    before = _ANYWAY.set(asked)
    try:
        yield
    finally:
        _ANYWAY.reset(before)


@cache
def _trial() -> Outcome:
    return run("pass")


def refusal() -> str:
    """Why generated code is not run on this machine; empty where it is. One trial, then remembered."""
    outcome = _trial()
    if outcome.finished:
        return ""
    if outcome.lacking == ["sandbox"] or not sys.platform.startswith("linux"):
        return outcome.reason  # nothing is there that could run it
    return "" if _ANYWAY.get() else f"{outcome.reason}; --run-code-anyway runs it nevertheless"


def unkept() -> list[str]:
    """Promises that this machine does not keep while generated code runs nevertheless."""
    return _trial().lacking if not refusal() else []


def run_answer(program: str) -> Outcome:
    """Run a program that a model wrote, as is asked for where promises cannot be kept."""
    return run(program, anyway=_ANYWAY.get())


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


@dataclass
class _Report:
    """What the jail told, line by line. The program can write to the same pipe once it has started."""

    lacking: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    error: str = ""
    status: int | None = None

    @classmethod
    def read(cls, said: bytes) -> _Report:
        """Nothing after `start` can change what was told before it; all of it is text, cut to a length."""
        report, started = cls(), False
        for line in said.splitlines():
            word, _, text = line[:_LINE_BYTES].decode("utf-8", "replace").partition(" ")
            if not started:
                if word == "note":
                    report.notes.append(text)
                elif word == "lacking":
                    report.lacking = [name for name in text.split(",") if name]
                started = word == "start"
            if word == "token":
                report.tokens.append(text)
            elif word == "error":
                report.error = text
            elif word == "status" and text.removeprefix("-").isdecimal():
                report.status = int(text)
        return report


def _outcome(
    report: _Report, output: bytes, token: str, timed_out: bool, limits: SandboxLimits, anyway: bool
) -> Outcome:
    text = output.decode("utf-8", "replace")
    if report.lacking is None:
        reason = "the sandbox could not be started: " + (text.strip().splitlines() or ["no message"])[-1]
        return Outcome(False, reason, text, lacking=["sandbox"])
    if report.lacking and not anyway:
        reason = (
            f"generated code is not run: this machine cannot keep the promise of {', '.join(report.lacking)}"
        )
        why = "; ".join(report.notes) or "the kernel gave no reason"
        return Outcome(False, f"{reason} ({why})", text, report.lacking, report.notes)
    finished = token in report.tokens and not timed_out
    reason = _reason(report, finished, timed_out, limits)
    return Outcome(finished, reason, text, report.lacking, report.notes)


def _reason(report: _Report, finished: bool, timed_out: bool, limits: SandboxLimits) -> str:
    if finished:
        return "finished"
    if timed_out:
        return f"stopped after {limits.wall_seconds:g} s"
    if report.error:
        return report.error
    if report.status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"killed at a limit ({limits.cpu_seconds} s of CPU)"
    return f"ended early with status {report.status}"
