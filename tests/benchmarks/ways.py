"""The ways in which a program can be locked up, each as who runs it: root, or a user without any rights.

As root, the user is nobody: a process of theirs runs the sandbox, by a Python that they may read.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pytest

import lorasmith
from lorasmith.benchmarks.sandbox.run import Outcome, SandboxLimits, run

NOBODY = 65534
QUICK = SandboxLimits(wall_seconds=10, cpu_seconds=1, memory_bytes=256 << 20, file_bytes=1 << 20)

_ASK = """
import json, sys
from dataclasses import asdict
from lorasmith.benchmarks.sandbox.run import SandboxLimits, run
asked = json.load(sys.stdin)
print(json.dumps(asdict(run(asked["program"], SandboxLimits(**asked["limits"]), mode=asked["mode"]))))
"""


@dataclass(frozen=True)
class Way:
    """How programs are locked up, and by whom."""

    mode: str
    user: int
    """Who runs the sandbox; what an attack aims at belongs to them."""

    def run(self, program: str, limits: SandboxLimits = QUICK) -> Outcome:
        """Run a program this way; its common indent is taken off."""
        program = textwrap.dedent(program)
        if self.user == os.getuid():
            return run(program, limits, mode=self.mode)
        asked = {"program": program, "limits": asdict(limits), "mode": self.mode}
        done = self.process([*_python(), "-c", _ASK], stdin=json.dumps(asked))
        assert done.returncode == 0, done.stderr
        return Outcome(**json.loads(done.stdout))

    def process(self, command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        """A process of the one who runs the sandbox."""
        other = self.user != os.getuid()
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(_sources()), "TMPDIR": tempfile.gettempdir()},
            user=self.user if other else None,
            group=self.user if other else None,
            extra_groups=[] if other else None,
        )

    def victim(self) -> subprocess.Popen[bytes]:
        """A process of theirs that waits, for attacks on processes; end it."""
        other = self.user != os.getuid()
        return subprocess.Popen(
            ["/bin/sleep", "60"],
            user=self.user if other else None,
            group=self.user if other else None,
            extra_groups=[] if other else None,
        )


WAYS = [
    Way(mode, user)
    for user in sorted({os.getuid(), NOBODY if os.getuid() == 0 else os.getuid()})
    for mode in ("best", "user", "landlock", "landlock-1")
    if user == os.getuid() or mode != "user"  # for a user the best way is that of a user
]


def usable(way: Way) -> Way:
    """The way, where this machine has it; what a machine may lack is skipped, a broken sandbox is not."""
    if way.user != os.getuid() and not _python():
        pytest.skip("no Python that nobody may read")
    outcome = way.run("pass")
    assert outcome.lacking != ["sandbox"], outcome.reason
    if outcome.lacking:
        pytest.skip(outcome.reason)
    if way.mode == "best" and any(note.startswith("no namespaces") for note in outcome.notes):
        pytest.skip(f"as landlock: {outcome.notes}")
    return way


@cache
def _python() -> list[str]:
    """A Python that everybody may read; empty where there is none."""
    for name in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        path = Path(name)
        if path.exists() and all(folder.stat().st_mode & 0o001 for folder in path.parents):
            version = subprocess.run(
                [name, "-c", "import sys; print(sys.version_info >= (3, 11))"],
                check=False,
                capture_output=True,
                text=True,
            )
            if version.stdout.strip() == "True":
                return [name]
    return []


@cache
def _sources() -> Path:
    """What the sandbox needs of lorasmith, where everybody may read it."""
    source = Path(lorasmith.__file__).parent
    folder = Path(tempfile.mkdtemp(prefix="sandbox-sources-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder)
    own = folder / "lorasmith" / "benchmarks"
    shutil.copytree(source / "benchmarks" / "sandbox", own / "sandbox")
    for name in ("__init__.py", "benchmarks/__init__.py"):
        shutil.copy(source / name, own.parent / name)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
