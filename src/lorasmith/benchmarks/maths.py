"""MATH: competition problems with a worked solution; right when the final answer is mathematically equal.

Source: github.com/hendrycks/math (Hendrycks et al., 2021, arXiv:2103.03874); taken down from the hub, never
shipped. Layouts, with an invented problem:

    {"problem": "What is $2^5$?", "level": "Level 1", "type": "Prealgebra", "solution": "… $\\\\boxed{32}$."}
    MATH-500: {"problem": …, "solution": …, "answer": "32", "subject": "Prealgebra", "level": 1,
               "unique_id": "test/prealgebra/1.json"}

The final answer is the last \\boxed{} of the solution; answers are compared by math-verify.
"""

from __future__ import annotations

import atexit
import json
import re
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

from lorasmith.benchmarks.base import Benchmark, Item, RowError, Scores, Source, SourceRow, Unscored, text
from lorasmith.benchmarks.maths_final import final_answers, last_boxed
from lorasmith.benchmarks.maths_text import compact, letters_of, normalise, same_base
from lorasmith.records.dataset import Example

# Whether two answers are mathematically equal: by the same text, else by math-verify under a time limit.
#
# math-verify's own limits need signals and the main thread, so it runs in a process of its own that is
# killed at the deadline. It parses what a model wrote: that process has limits and may not start anything.


SECONDS = 10.0
"""Deadline of one comparison; the slowest of the case table takes 0.3 s."""
_LONGEST = 2000
"""Signs of an answer that is compared; published ones have below 200, and a loop of signs has no end."""
_START_SECONDS = 120.0
"""Deadline of the imports of sympy on a busy machine."""


def equal(final: str, answer: str) -> bool:
    """Compare a reference answer (LaTeX) with what a model wrote; raises `Unscored` without a verdict."""
    said = final_answers(answer)
    if compact(final) in map(compact, said):
        return True
    stated = said[-1]
    if (based := same_base(final, stated)) is not None:
        return based
    if (letters := letters_of(final)) is not None:
        return letters == letters_of(stated)
    if _is_list(final) != _is_list(stated):
        return False  # 1,234 is one number, (1,234) are two, and 12 is not 1,2
    if find_spec("math_verify") is None:
        raise Unscored("math-verify is not installed: pip install 'lorasmith[benchmarks]'")
    if len(stated) > _LONGEST:
        return False
    gold, given = (f"\\boxed{{{normalise(text)}}}" for text in (final, stated))
    told = _worker().ask({"gold": gold, "answer": given})
    if told.get("verdict") is None:
        raise Unscored(str(told.get("reason")))
    return bool(told["verdict"])


def _is_list(expression: str) -> bool:
    """Whether several values stand there, between commas."""
    return "," in normalise(expression)


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
            try:
                told = json.loads(line)
            except (ValueError, RecursionError):
                told = None
            if isinstance(told, dict) and {"verdict", "reason"} & told.keys():
                return told
            # Half a line of a process that died, or words of a library: what comes next is no answer either.
            self.stop()
            return {"verdict": None, "reason": "math-verify failed: it gave something other than a verdict"}

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


INSTRUCTION = "Put the final answer in \\boxed{}."
_LEVEL = re.compile(r"(?:level\s*)?([1-5])", re.IGNORECASE)


class Maths(Benchmark):
    """12,500 problems in 7 subjects and 5 levels as published, or the 500 of MATH-500."""

    name = "MATH"
    domain = "math"
    source = "https://github.com/hendrycks/math"
    licence = "MIT, taken down by the rights holder of the problems"
    columns = "problem, solution, level, and type or subject"
    hub = Source(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        ("test.jsonl",),
        "the whole of MATH was taken down from the hub after a notice of the problems' rights holder "
        "(January 2025); this is the subset of 500 problems, as long as the hub has it",
    )
    # Longer than nearly every published solution: at 512 one in twelve would be cut off.
    max_new_tokens = 1280
    stop_texts = ("\nProblem:",)
    graded = True
    needs: ClassVar[Mapping[str, Any]] = {"final_answer": str}

    instruction = INSTRUCTION

    def recognises(self, row: SourceRow) -> bool:
        fields = row.value.keys()
        return {"problem", "solution", "level"} <= fields and bool(fields & {"type", "subject"})

    def read(self, row: SourceRow, *, seed: int) -> Item:
        problem = text(row, "problem")
        solution = text(row, "solution")
        answer = row.value.get("answer")
        final = answer.strip() if isinstance(answer, str) and answer.strip() else last_boxed(solution)
        if not final:
            raise RowError("the solution has no \\boxed{} answer")
        return Item(
            record_id=_record_id(row),
            prompt=f"{problem.strip()}\n\n{INSTRUCTION}",
            response=solution,
            question=problem,
            subdomain=text(row, "type", "subject").strip(),
            native=_level(row.value),
            native_field="level",
            extra={"final_answer": final},
        )

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        return ("medium" if item.native in ("Level 1", "Level 2") else "hard"), "level"

    def judge(self, example: Example, answer: str) -> Scores:
        """1.0 when the answer equals the final answer, by the same text or by math-verify, else 0.0."""
        return {"accuracy": float(equal(example.metadata.extra()["final_answer"], answer))}


def _level(row: Mapping[str, object]) -> str:
    """`Level 3` from "Level 3" or 3; empty for "Level ?" and blanks."""
    match = _LEVEL.fullmatch(str(row.get("level", "")).strip())
    return f"Level {match.group(1)}" if match else ""


def _record_id(row: SourceRow) -> str:
    """MATH-500's own id; a problem's own file (`algebra/12.json`); else the start of the hash."""
    own = row.value.get("unique_id")
    if isinstance(own, str) and own.strip():
        return own.strip().removesuffix(".json")
    parts = row.file.removesuffix(".json").split("/")
    if parts[-1].isdigit():
        return "/".join(parts[-2:])
    return row.sha256[:16]
