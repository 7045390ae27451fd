"""HumanEval: finish a Python function; right when its tests pass.

Source: github.com/openai/human-eval (Chen et al., 2021, arXiv:2107.03374), 164 rows, MIT.

    {"task_id": "HumanEval/0", "prompt": "from typing import List\\n\\n\\ndef has_close_elements(…",
     "entry_point": "has_close_elements", "canonical_solution": "    for idx, elem in …",
     "test": "…def check(candidate):\\n    assert candidate([1.0, …"}

The answer is read as the continuation of the prompt, its first indent included: without the indent the
program is invalid, so nothing here strips.
"""

from __future__ import annotations

from lorasmith.benchmarks.base import Benchmark, Item, RowError, Scores, SourceRow, Unscored, text
from lorasmith.records.dataset import Example

_FIELDS = {"task_id", "prompt", "entry_point", "canonical_solution", "test"}


class HumanEval(Benchmark):
    """164 hand-written programming tasks."""

    name = "HumanEval"
    domain = "code generation"
    source = "https://github.com/openai/human-eval"
    licence = "MIT"

    def recognises(self, row: SourceRow) -> bool:
        return row.value.keys() >= _FIELDS

    def read(self, row: SourceRow, *, seed: int) -> Item:
        entry_point = text(row, "entry_point")
        prompt = text(row, "prompt")
        if f"def {entry_point}" not in prompt:
            raise RowError("the prompt does not define the function named by 'entry_point'")
        return Item(
            record_id=text(row, "task_id"),
            prompt=prompt,
            response=text(row, "canonical_solution"),
            question=prompt,
            extra={"tests": text(row, "test"), "entry_point": entry_point},
        )

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        return "medium", "benchmark"

    def judge(self, example: Example, answer: str) -> Scores:
        raise Unscored("the sandbox is not available")
