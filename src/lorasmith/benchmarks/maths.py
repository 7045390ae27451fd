"""MATH: competition problems with a worked solution; right when the final answer is mathematically equal.

Source: github.com/hendrycks/math (Hendrycks et al., 2021, arXiv:2103.03874); taken down from the hub, never
shipped. Layouts, with an invented problem:

    {"problem": "What is $2^5$?", "level": "Level 1", "type": "Prealgebra", "solution": "… $\\\\boxed{32}$."}
    MATH-500: {"problem": …, "solution": …, "answer": "32", "subject": "Prealgebra", "level": 1,
               "unique_id": "test/prealgebra/1.json"}

The final answer is the last \\boxed{} of the solution; answers are compared by math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorasmith.benchmarks import math_metric
from lorasmith.benchmarks.base import Benchmark, Item, RowError, Scores, SourceRow, text
from lorasmith.records.dataset import Example

INSTRUCTION = "Put the final answer in \\boxed{}."
_LEVEL = re.compile(r"(?:level\s*)?([1-5])", re.IGNORECASE)


class Maths(Benchmark):
    """12,500 problems in 7 subjects and 5 levels as published, or the 500 of MATH-500."""

    name = "MATH"
    domain = "math"
    source = "https://github.com/hendrycks/math"
    licence = "MIT, taken down by the rights holder of the problems"
    graded = True

    def recognises(self, row: SourceRow) -> bool:
        fields = row.value.keys()
        return {"problem", "solution", "level"} <= fields and bool(fields & {"type", "subject"})

    def read(self, row: SourceRow, *, seed: int) -> Item:
        problem = text(row, "problem")
        solution = text(row, "solution")
        answer = row.value.get("answer")
        final = (
            answer.strip() if isinstance(answer, str) and answer.strip() else math_metric.last_boxed(solution)
        )
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
        return {"accuracy": float(math_metric.equal(example.metadata.extra()["final_answer"], answer))}


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
