"""Invented rows in the layouts of all five benchmarks, and what a refused build leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import DataError
from lorasmith.records.dataset import DatasetFindings
from lorasmith.testset.build import build

GSM8K = {"question": "Ann has 3 pens and buys 4. How many has she?", "answer": "3 + 4 = 7\n#### 7"}


def math_row(number: int, **changes: Any) -> dict[str, Any]:
    subject = ("Algebra", "Geometry", "Prealgebra")[number % 3]
    row = {
        "problem": f"Let $x = {number}$ in the invented problem number {number}. Compute $x + {number % 7}$.",
        "level": f"Level {number % 5 + 1}",
        "type": subject,
        "solution": f"Adding gives $\\boxed{{{number + number % 7}}}$.",
    }
    return row | changes


def mmlu_row(number: int, subject: str = "anatomy") -> dict[str, Any]:
    choices = [f"{number} {name}" for name in ("alphas", "betas", "gammas", "deltas")]
    return {"question": f"Which is {number}?", "subject": subject, "choices": choices, "answer": number % 4}


def code_row(number: int) -> dict[str, Any]:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def f{number}(x):\n",
        "entry_point": f"f{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(f):\n    assert f(1) == {number + 1}\n",
    }


def gpqa_row(number: int) -> dict[str, Any]:
    wrong = {f"Incorrect Answer {k}": f"wrong {k} for {number}" for k in (1, 2, 3)}
    return {
        "Question": f"What is the invented constant number {number} of nature?",
        "Correct Answer": f"right for {number}",
        **wrong,
        "High-level domain": ("Physics", "Biology")[number % 2],
        "Writer's Difficulty Estimate": "",
        "Record ID": f"rec{number}",
    }


def drop_row(number: int) -> dict[str, Any]:
    return {
        "section_id": f"nfl_{number}",
        "query_id": f"q{number}",
        "passage": f"Team {number} scored {number} points in the invented game.",
        "question": f"How many points did team {number} score?",
        "answers_spans": {"spans": [str(number)], "types": ["number"]},
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def findings(output: Path) -> DatasetFindings:
    path = output.parent / "findings.json"
    return DatasetFindings.from_json(path.read_bytes(), path)


def codes(output: Path) -> set[str]:
    return {finding.code for finding in findings(output).findings}


def refused(folder: Path, tmp_path: Path, only: list[str], code: str) -> DatasetFindings:
    """Strict stops, the findings are written, and no test set is."""
    output = tmp_path / "refused" / "test.jsonl"
    with pytest.raises(DataError, match=r"findings\.json"):
        build(folder, output, samples_per_benchmark=5, only=only)
    assert not output.exists()
    assert code in codes(output), codes(output)
    return findings(output)


def findings_text(output: Path) -> str:
    return (output.parent / "findings.json").read_text()
