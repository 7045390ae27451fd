"""GPQA: graduate-level questions with four choices in a seeded order; right when the letter is.

Source: github.com/idavidrein/gpqa (Rein et al., 2023, arXiv:2311.12022), CC BY 4.0, gated. The authors ask
that no example appears in plain text, so this header shows invented values only:

    CSV, 78 columns:  Question="…", Correct Answer="…", Incorrect Answer 1..3="…", Subdomain="Genetics",
                      High-level domain="Biology", Writer's Difficulty Estimate="Hard …", Record ID="rec…"
    jsonl:            {"question": "…", "options": ["…", …], "answer": "B"}  in a file named gpqa
                      {"question": "…", "answer": "…"}  in a file named gpqa; without choices, not scored
"""

from __future__ import annotations

from lorasmith.benchmarks.base import Item, RowError, Source, SourceRow, text
from lorasmith.benchmarks.choices import (
    LETTERS,
    LetteredChoices,
    letter_of,
    listed_choices,
    prompt_of,
    require_choices,
    seeded_order,
)
from lorasmith.benchmarks.gsm8k import is_gsm8k

_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_ESTIMATE = "Writer's Difficulty Estimate"


class Gpqa(LetteredChoices):
    """Main 448 questions, diamond 198 and extended 546 as published."""

    name = "GPQA"
    domain = "science Q&A"
    source = "https://huggingface.co/datasets/Idavidrein/gpqa"
    licence = "CC BY 4.0, gated"
    columns = (
        "Question, Correct Answer, Incorrect Answer 1 to 3; or question, answer and, if possible, options"
    )
    hub = Source(
        "Idavidrein/gpqa",
        "633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        ("gpqa_main.csv",),
        "its authors ask that no example appears in plain text: keep this file to yourself",
    )
    may_lack = "choices"
    private = True

    def recognises(self, row: SourceRow) -> bool:
        if {"Question", "Correct Answer", *_WRONG} <= row.value.keys():
            return True
        return self._is_short(row) and not is_gsm8k(row)

    def read(self, row: SourceRow, *, seed: int) -> Item:
        if self._is_short(row):
            if listed_choices(row.value) is not None:
                return self._read_listed(row)
            question = text(row, "question")
            return Item(
                record_id=row.sha256[:16],
                prompt=question,
                response=text(row, "answer"),
                question=question,
                extra={"private": True},
            )
        question = text(row, "Question").strip()
        right = text(row, "Correct Answer").strip()
        choices = require_choices([right, *(row.value[name] for name in _WRONG)])
        if right in choices[1:]:
            raise RowError("the right answer is also one of the wrong ones")
        record_id = _optional(row, "Record ID") or row.sha256[:16]
        order = seeded_order(seed, record_id, choices)
        letter = LETTERS[order.index(0)]
        shown = [choices[index] for index in order]
        return Item(
            record_id=record_id,
            prompt=prompt_of(question, shown),
            response=letter,
            question=question,
            subdomain=_optional(row, "High-level domain") or "unknown",
            native=_optional(row, _ESTIMATE).split(" (")[0],
            native_field=_ESTIMATE,
            extra={
                "private": True,
                "topic": _optional(row, "Subdomain") or "unknown",
                "choices": shown,
                "answer": letter,
                "choice_order": f"seed {seed}",
            },
        )

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        return "hard", "benchmark"

    def _read_listed(self, row: SourceRow) -> Item:
        """Question, list of options and the right letter or number; the options stay in their order."""
        question = text(row, "question")
        choices = require_choices(listed_choices(row.value) or [])
        letter = letter_of(row.value["answer"], choices)
        return Item(
            record_id=_optional(row, "Record ID") or row.sha256[:16],
            prompt=prompt_of(question, choices),
            response=letter,
            question=question,
            extra={"private": True, "choices": choices, "answer": letter, "choice_order": "as in the file"},
        )

    @staticmethod
    def _is_short(row: SourceRow) -> bool:
        """Question and answer alone could be any set: here the file's name has to say GPQA as well."""
        named = "gpqa" in row.file.lower()
        return named and {"question", "answer"} <= row.value.keys()


def _optional(row: SourceRow, name: str) -> str:
    value = row.value.get(name)
    return value.strip() if isinstance(value, str) else ""
