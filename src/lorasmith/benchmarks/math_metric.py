"""Whether two answers are mathematically equal: by the same text, else by math-verify under a time limit.

math-verify's own limits need signals and the main thread, so it runs in a process of its own that is killed
at the deadline. It parses what a model wrote: that process has limits and may not start anything.
"""

from __future__ import annotations

import atexit
import json
import re
import selectors
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

from lorasmith.benchmarks.base import Unscored

SECONDS = 10.0
"""For one comparison; the slowest of the case table takes 0.3 s."""
_START_SECONDS = 120.0
"""For the imports of sympy on a busy machine."""


def equal(final: str, answer: str) -> bool:
    """Compare a reference answer (LaTeX) with what a model wrote; raises `Unscored` without a verdict."""
    boxed = last_boxed(answer)
    if boxed is not None and _plain(boxed) == _plain(final):
        return True
    if find_spec("math_verify") is None:
        raise Unscored("math-verify is not installed: pip install 'lorasmith[benchmarks]'")
    told = _worker().ask({"gold": f"\\boxed{{{final}}}", "answer": answer})
    if told.get("verdict") is None:
        raise Unscored(str(told["reason"]))
    return bool(told["verdict"])


def last_boxed(solution: str) -> str | None:
    """What stands in the last \\boxed{…} (or \\fbox{…}), braces matched; None where there is none."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    rest = solution[solution.index("box", start) + 3 :].removeprefix("ed")
    if not rest.startswith("{"):
        # `\boxed 5` is legal TeX: the next sign alone is boxed.
        return rest.strip().split("$")[0].split()[0] if rest.strip() and rest[0].isspace() else None
    depth = 0
    for index, sign in enumerate(rest):
        if sign in "{}" and rest[index - 1 : index] != "\\":
            depth += 1 if sign == "{" else -1
            if depth == 0:
                return rest[1:index].strip() or None
    return None


def _plain(expression: str) -> str:
    return re.sub(r"\s+", "", expression)


class _Worker:
    """One process that compares, started when needed and again after it was killed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, question: dict[str, str], seconds: float = SECONDS) -> dict[str, Any]:
        """The verdict, or None with the reason when the time is over or the process died."""
        with self.lock:
            process = self.process if self.process and self.process.poll() is None else self._start()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            line = self._line(process, seconds)
            if line is None:
                self.stop()
                return {"verdict": None, "reason": f"math-verify gave no verdict within {seconds:g} s"}
            told: dict[str, Any] = json.loads(line)
            return told

    def _start(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorasmith.benchmarks.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._line(self.process, _START_SECONDS) is None:
            self.stop()
            raise Unscored("math-verify could not be started")
        return self.process

    @staticmethod
    def _line(process: subprocess.Popen[str], seconds: float) -> str | None:
        """The next line: one answer per question, so nothing is left in the buffer between two."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            return (process.stdout.readline() or None) if selector.select(seconds) else None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@cache
def _worker() -> _Worker:
    worker = _Worker()
    atexit.register(worker.stop)
    return worker
