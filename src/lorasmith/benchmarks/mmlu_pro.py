"""MMLU-Pro: up to ten choices over 14 subjects; right when the letter is.

Source: huggingface.co/datasets/TIGER-Lab/MMLU-Pro (Wang et al., 2024, arXiv:2406.01574), 12,032 test rows,
MIT. Layout, with an invented question:

    {"question_id": 70, "question": "Which of these …?", "options": ["Joule", …], "answer": "B",
     "answer_index": 1, "cot_content": "", "category": "physics", "src": "…"}

Here a model answers directly, by the likeliest letter; the paper reports that beside its five worked
examples with reasoning, which give higher numbers. Older rows fill the list up to ten with "N/A".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lorasmith.benchmarks.base import Item, RowError, Source, SourceRow, text
from lorasmith.benchmarks.choices import LETTERS, LetteredChoices, choice_needs, prompt_of, require_choices

_FIELDS = {"question", "options", "answer", "category"}
_FEWEST = 3


class MmluPro(LetteredChoices):
    """14 subjects, 12,032 test questions as published."""

    name = "MMLU-Pro"
    domain = "multitask understanding"
    source = "https://huggingface.co/datasets/TIGER-Lab/MMLU-Pro"
    licence = "MIT"
    columns = "question, options, answer, answer_index"
    hub = Source(
        "TIGER-Lab/MMLU-Pro",
        "b189ec765aa7ed75c8acfea42df31fdae71f97be",
        ("data/test-00000-of-00001.parquet",),
        known={
            "data/test-00000-of-00001.parquet": (
                "0e24a191921c2f453518a537a8b2117bd137e7714d4ef1565e9ba06c1ecb9ad8"
            )
        },
    )
    needs: ClassVar[Mapping[str, Any]] = choice_needs(_FEWEST, len(LETTERS))

    def recognises(self, row: SourceRow) -> bool:
        return row.value.keys() >= _FIELDS and bool(row.value.keys() & {"answer_index", "cot_content"})

    def read(self, row: SourceRow, *, seed: int) -> Item:
        question, letter = text(row, "question"), text(row, "answer").strip().upper()
        listed = row.value["options"]
        if not isinstance(listed, list):
            raise RowError("the field 'options' is not a list")
        choices = require_choices([one for one in listed if one != "N/A"], _FEWEST, len(LETTERS))
        if letter not in tuple(LETTERS[: len(choices)]):
            raise RowError("the answer is not the letter of a choice")
        if row.value.get("answer_index", LETTERS.index(letter)) != LETTERS.index(letter):
            raise RowError("the fields 'answer' and 'answer_index' name different choices")
        return Item(
            record_id=str(row.value.get("question_id", row.sha256[:16])),
            prompt=prompt_of(question, choices),
            response=letter,
            question=" ".join([question, *choices]),
            subdomain=text(row, "category").strip(),
            extra={"question": question, "choices": choices, "answer": letter, "choice_order": "published"},
        )

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        return "hard", "benchmark"
