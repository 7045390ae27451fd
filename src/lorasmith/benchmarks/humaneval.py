"""HumanEval: finish a Python function; right when its tests pass.

Source: github.com/openai/human-eval (Chen et al., 2021, arXiv:2107.03374), 164 rows, MIT.

    {"task_id": "HumanEval/0", "prompt": "from typing import List\\n\\n\\ndef has_close_elements(…",
     "entry_point": "has_close_elements", "canonical_solution": "    for idx, elem in …",
     "test": "…def check(candidate):\\n    assert candidate([1.0, …"}

The answer is read as the continuation of the prompt, its first indent included: without the indent the
program is invalid, so nothing here strips.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from textwrap import dedent, indent
from typing import Any, ClassVar

from lorasmith.benchmarks.base import Benchmark, Item, RowError, Scores, Source, SourceRow, text
from lorasmith.benchmarks.code import code_blocks, pass_at_1
from lorasmith.records.dataset import Example

_FIELDS = {"task_id", "prompt", "entry_point", "canonical_solution", "test"}


class HumanEval(Benchmark):
    """164 hand-written programming tasks."""

    name = "HumanEval"
    domain = "code generation"
    source = "https://github.com/openai/human-eval"
    licence = "MIT"
    columns = "task_id, prompt, entry_point, canonical_solution, test"
    hub = Source(
        "openai/openai_humaneval",
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        ("openai_humaneval/test-00000-of-00001.parquet",),
    )
    max_new_tokens = 384
    # The stops of the paper, section 3.2.
    stop_texts = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    metrics = ("pass@1",)
    needs: ClassVar[Mapping[str, Any]] = {"tests": str, "entry_point": str}
    runs_code = True

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
        """pass@1: 1.0 when prompt, answer and tests run to their end in the sandbox, else 0.0."""
        extra = example.metadata.extra()
        tests = f"{extra['tests']}\ncheck({extra['entry_point']})\n"
        return pass_at_1(f"{program(example.prompt, answer, extra['entry_point'])}\n{tests}")


def program(prompt: str, answer: str, entry_point: str) -> str:
    """Prompt and answer as one program.

    Plain text continues the prompt. Of an answer with fenced code the last block counts that defines the
    function, else the last, which is then the function's body and gets the prompt's indent; a whole function
    follows the prompt's imports and helpers in its own right.
    """
    blocks = code_blocks(answer)
    if not blocks:
        return prompt + answer
    defines = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
    whole = [block for block in blocks if defines.search(block)]
    if not whole:
        last_line = prompt.rstrip().rpartition("\n")[2]
        margin = last_line[: len(last_line) - len(last_line.lstrip())]
        return prompt + indent(dedent(blocks[-1]), margin)
    start = defines.search(prompt)
    before = prompt[: start.start()] if start else ""
    return f"{before}\n{whole[-1]}"
