"""GSM8K: grade-school word problems with a worked solution; right when the final number is.

Source: github.com/openai/grade-school-math (Cobbe et al., 2021, arXiv:2110.14168), 1,319 test rows, MIT.
The hub's `main` and `socratic` have the layout of the original, here with an invented problem:

    {"question": "Ann has 3 pens and buys 4. How many has she?", "answer": "3 + 4 = <<3+4=7>>7 pens\\n#### 7"}

As in lm-evaluation-harness there are two readings of an answer: `accuracy` takes the number wherever a
model puts it, `accuracy_strict` only the one after `####`, which the prompt asks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, ClassVar

from lorasmith.benchmarks.base import Benchmark, Item, RowError, Scores, Source, SourceRow, Unscored, text
from lorasmith.records.dataset import Example

INSTRUCTION = "Solve the problem step by step. Give the final number alone on the last line, after ####."

# A minus behind a digit, a letter or a bracket is a subtraction, and commas belong to a number only between
# groups of three digits: "1,234" is one number, "1, 2" and "1,2" are two.
_NUMBER = r"(?:(?<![\w)\]])[-−])?\$?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?<![\w.])\.\d+"
_ANY = re.compile(_NUMBER)
_MARKED = re.compile(rf"####\s*\$?\s*({_NUMBER})")
_BOXED = re.compile(rf"\\boxed\{{\s*(?:\\\$|\\text\{{)?\s*({_NUMBER})")
_STATED = re.compile(rf"(?i:\banswer\b(?:\s+is|\s*:|\s*=)?)[^\d\n.]{{0,40}}?({_NUMBER})")


class Gsm8k(Benchmark):
    """1,319 test problems as published."""

    name = "GSM8K"
    domain = "math"
    source = "https://huggingface.co/datasets/openai/gsm8k"
    licence = "MIT"
    columns = "question, answer that ends with #### and a number"
    hub = Source(
        "openai/gsm8k",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        ("main/test-00000-of-00001.parquet",),
    )
    stop_texts = ("\nQuestion:", "\n\n\n")
    needs: ClassVar[Mapping[str, Any]] = {"final_answer": str}

    metrics = ("accuracy", "accuracy_strict")

    instruction = INSTRUCTION

    def recognises(self, row: SourceRow) -> bool:
        return is_gsm8k(row)

    def read(self, row: SourceRow, *, seed: int) -> Item:
        question, solution = text(row, "question"), text(row, "answer")
        final = _MARKED.search(solution)
        if final is None:
            raise RowError("no number stands after ####")
        return Item(
            record_id=row.sha256[:16],
            prompt=f"{question.strip()}\n\n{INSTRUCTION}",
            response=solution,
            question=question,
            extra={"final_answer": _plain(final.group(1))},
        )

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        return "easy", "benchmark"

    def judge(self, example: Example, answer: str) -> Scores:
        final = example.metadata.extra()["final_answer"]
        if not _ANY.fullmatch(final):
            raise Unscored("the row's own final answer is no number")
        marked = _MARKED.findall(answer)
        found = final_number(answer)
        return {
            "accuracy": float(found == _value(final)),
            "accuracy_strict": float(bool(marked) and _value(marked[-1]) == _value(final)),
        }


def is_gsm8k(row: SourceRow) -> bool:
    """GSM8K ends each answer with a line `#### 72`."""
    answer = row.value.get("answer")
    return "question" in row.value and isinstance(answer, str) and "\n#### " in "\n" + answer


def final_number(answer: str) -> Decimal | None:
    """The number an answer comes to: after ####, boxed, stated ("the answer is 7"), else the last one.

    The last of each kind counts, since models correct themselves.
    """
    for pattern in (_MARKED, _BOXED, _STATED, _ANY):
        numbers = pattern.findall(answer)
        if numbers:
            return _value(numbers[-1])
    return None


def _value(number: str) -> Decimal:
    return Decimal(_plain(number))


def _plain(number: str) -> str:
    return re.sub(r"[$,]", "", number).replace("−", "-")
