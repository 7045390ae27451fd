"""What a container leaves of the sandbox: the kernel's refusals are given as reasons, nothing runs unsaid."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64",
    reason="the container's own filter is written for Linux on x86-64",
)

UNSHARE, MOUNT, SETNS, LANDLOCK, SECCOMP = 272, 165, 308, (444, 445, 446), 317

_IN_A_CONTAINER = """
import ctypes, json, struct, sys
denied, program, anyway = json.load(sys.stdin)
def step(code, value, if_true=0, if_false=0):
    return struct.pack("<HBBI", code, if_true, if_false, value)
filter = step(0x20, 0) + b"".join(step(0x15, number, 0, 1) + step(6, 0x50001) for number in denied)
filter += step(6, 0x7FFF0000)
buffer = ctypes.create_string_buffer(filter)
header = struct.pack("<HxxxxxxQ", len(filter) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0
from dataclasses import asdict
from lorasmith.benchmarks.sandbox import run
with run.anyway(anyway):
    told = {"refusal": run.refusal(), "unkept": run.unkept(), **asdict(run.run_answer(program))}
print(json.dumps(told))
"""


def in_container(denied: list[int], program: str = "print('ran')", *, anyway: bool = False) -> dict[str, Any]:
    """What becomes of a program where some calls were forbidden already, as by Docker's profile."""
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_CONTAINER],
        input=json.dumps([denied, program, anyway]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_without_namespaces_landlock_keeps_every_promise(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("KEY")
    key.chmod(0o600)
    program = f"""
import os, resource
for call in (lambda: os.chmod({str(key)!r}, 0o666), lambda: os.utime({str(key)!r}, (0, 0)),
             lambda: resource.prlimit({os.getpid()}, resource.RLIMIT_CORE, (0, 0))):
    try:
        call()
    except OSError:
        continue
    raise SystemExit("came through")
print("refused")
"""
    told = in_container([UNSHARE, MOUNT, SETNS], program)
    assert (told["refusal"], told["lacking"], told["output"]) == ("", [], "refused\n"), told
    assert any("no namespaces" in note and "not permitted" in note for note in told["notes"])
    assert key.stat().st_mode & 0o777 == 0o600


def test_without_namespaces_and_landlock_nothing_runs_and_the_kernel_is_quoted() -> None:
    told = in_container([UNSHARE, MOUNT, SETNS, *LANDLOCK])
    assert (told["lacking"], told["unkept"], told["output"]) == (["files", "disk"], [], "")
    for words in ("files, disk", "no namespaces: [Errno 1] unshare", "no Landlock", "--run-code-anyway"):
        assert words in told["refusal"]


def test_where_promises_cannot_be_kept_code_runs_only_when_it_is_asked_for() -> None:
    told = in_container([UNSHARE, MOUNT, SETNS, *LANDLOCK], anyway=True)
    assert (told["refusal"], told["finished"], told["output"]) == ("", True, "ran\n")
    assert told["lacking"] == told["unkept"] == ["files", "disk"]  # and it is told all the same
