"""MBPP: write a small Python function from a sentence; right when its asserts pass.

Source: github.com/google-research/google-research/tree/master/mbpp (Austin et al., 2021, arXiv:2108.07732),
500 test rows of 974, CC BY 4.0. Layouts, with an invented task:

    full:      {"task_id": 11, "text": "Write a function to double a number.", "code": "def double(x): …",
                "test_list": ["assert double(2) == 4", …], "test_setup_code": "", "challenge_test_list": []}
    sanitized: {"source_file": "…", "task_id": 11, "prompt": "Write a function …", "code": "…",
                "test_imports": ["import math"], "test_list": ["assert …"]}

Tasks 11 to 510 are the test split, in the one file of the original as well as on the hub. The prompt shows
the asserts, as in the paper: they are what names the function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from lorasmith.benchmarks.base import (
    Benchmark,
    Item,
    NotForTests,
    RowError,
    Scores,
    Source,
    SourceRow,
    text,
)
from lorasmith.benchmarks.code import code_blocks, pass_at_1
from lorasmith.records.dataset import Example

INSTRUCTION = "Answer with the Python code alone."
_TESTED = range(11, 511)
_DEFINES = re.compile(r"^\s*(?:async def|def|class|import|from)\b", re.MULTILINE)


class Mbpp(Benchmark):
    """500 test tasks as published, 257 of them in the sanitized file."""

    name = "MBPP"
    domain = "code generation"
    source = "https://huggingface.co/datasets/google-research-datasets/mbpp"
    licence = "CC BY 4.0"
    columns = "task_id, text or prompt, code, test_list"
    hub = Source(
        "google-research-datasets/mbpp",
        "4bb6404fdc6cacfda99d4ac4205087b89d32030c",
        ("full/test-00000-of-00001.parquet",),
    )
    stop_texts = ("\nassert", "\nif __name__", "\nprint", "\n[DONE]")
    needs: ClassVar[Mapping[str, Any]] = {"setup": str, "tests": str}
    metrics = ("pass@1",)
    runs_code = True

    def recognises(self, row: SourceRow) -> bool:
        """MBPP+ has the same fields and its longer tests in `test`: it is another set."""
        fields = row.value.keys()
        named = {"task_id", "code", "test_list"} <= fields and bool(fields & {"text", "prompt"})
        return named and "test" not in fields

    def read(self, row: SourceRow, *, seed: int) -> Item:
        number = row.value["task_id"]
        if isinstance(number, bool) or not isinstance(number, int):
            raise RowError("the field 'task_id' is not a number")
        if number not in _TESTED:
            raise NotForTests("only tasks 11 to 510 are the test split; the others are there to learn from")
        task, tests = text(row, "text", "prompt").strip(), "\n".join(_lines(row, "test_list"))
        if not tests:
            raise RowError("the field 'test_list' is empty")
        imports = "\n".join(_lines(row, "test_imports")) if "test_imports" in row.value else ""
        setup = imports or str(row.value.get("test_setup_code") or "")
        return Item(
            record_id=f"{number}" if "text" in row.value else f"sanitized/{number}",
            prompt=f"{task}\nThe code has to pass these tests:\n\n{tests}\n\n{INSTRUCTION}\n",
            response=text(row, "code"),
            question=f"{task}\n{tests}",
            extra={"setup": setup, "tests": tests},
        )

    def question_in(self, prompt: str) -> tuple[str, str]:
        return "", prompt.partition("\nThe code has to pass these tests:")[0]

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        return "medium", "benchmark"

    def judge(self, example: Example, answer: str) -> Scores:
        """pass@1: 1.0 when the code and its asserts run to their end in the sandbox, else 0.0."""
        extra = example.metadata.extra()
        return pass_at_1(f"{extra['setup']}\n{code_of(answer)}\n{extra['tests']}\n")


def code_of(answer: str) -> str:
    """The fenced blocks of an answer that define or import something, one after the other; else all of it.

    The last block may be open. A block without a definition shows how to call the function, or is no Python.
    """
    blocks = code_blocks(answer)
    return "\n".join([block for block in blocks if _DEFINES.search(block)] or blocks) or answer


def _lines(row: SourceRow, name: str) -> list[str]:
    lines = row.value[name]
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise RowError(f"the field {name!r} is not a list of texts")
    return lines
