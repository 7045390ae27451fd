"""ARC: science questions from school tests with three to five choices; right when the letter is.

Source: allenai.org/data/arc (Clark et al., 2018, arXiv:1803.05457), Challenge 1,172 and Easy 2,376 test rows,
CC BY-SA 4.0. Layouts, with an invented question:

    hub:      {"id": "Mercury_7", "question": "Which …?", "answerKey": "B",
               "choices": {"text": ["sand", …], "label": ["A", …]}}
    original: {"id": "Mercury_7", "answerKey": "B",
               "question": {"stem": "Which …?", "choices": [{"text": "sand", "label": "A"}, …]}}

Some rows label their choices 1 to 4; they are shown under letters like the others. Which of the two sets a
row belongs to stands in the name of its file or folder alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lorasmith.benchmarks.base import Item, RowError, Source, SourceRow, text
from lorasmith.benchmarks.choices import LETTERS, LetteredChoices, choice_needs, prompt_of, require_choices

_FEWEST, _MOST = 3, 5


class Arc(LetteredChoices):
    """Challenge and Easy, 7,787 questions as published."""

    name = "ARC"
    domain = "science Q&A"
    source = "https://huggingface.co/datasets/allenai/ai2_arc"
    licence = "CC BY-SA 4.0"
    columns = "id, question, choices {text, label}, answerKey"
    hub = Source(
        "allenai/ai2_arc",
        "210d026faf9955653af8916fad021475a3f00453",
        ("ARC-Challenge/test-00000-of-00001.parquet",),
        "this is ARC-Challenge; for ARC-Easy put its file into a folder of that name",
    )
    needs: ClassVar[Mapping[str, Any]] = choice_needs(_FEWEST, _MOST)

    def recognises(self, row: SourceRow) -> bool:
        """ARC's ids begin with a capital; OpenBookQA and CommonsenseQA share its fields, not its ids."""
        value = row.value
        ours = str(value.get("id", ""))[:1].isupper() and "question_concept" not in value
        nested = isinstance(value.get("question"), dict)
        return ours and "answerKey" in value and (nested or {"question", "choices"} <= value.keys())

    def read(self, row: SourceRow, *, seed: int) -> Item:
        fields, nested = dict(row.value), row.value["question"]
        if isinstance(nested, dict):
            fields |= {"question": nested.get("stem"), "choices": nested.get("choices")}
        texts, labels = _columns(fields.get("choices"))
        choices = require_choices(texts, _FEWEST, _MOST)
        question = text(SourceRow(row.file, row.number, fields), "question")
        key = text(row, "answerKey").strip()
        if labels.count(key) != 1:
            raise RowError("the answerKey is not the label of one choice")
        letter = LETTERS[labels.index(key)]
        kind = _set_of(row.file)
        return Item(
            record_id=text(row, "id"),
            prompt=prompt_of(question, choices),
            response=letter,
            question=" ".join([question, *choices]),
            subdomain=kind or "unknown",
            native=kind.removeprefix("ARC-"),
            native_field="file",
            extra={"question": question, "choices": choices, "answer": letter, "choice_order": "published"},
        )

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        return {"Easy": "easy", "Challenge": "hard"}.get(item.native, "medium"), "file"


def _columns(choices: object) -> tuple[Sequence[object], list[str]]:
    """Texts and labels, from two lists or from a list of pairs."""
    if isinstance(choices, list):
        pairs = [one for one in choices if isinstance(one, dict)]
        return [one.get("text") for one in pairs], [str(one.get("label")) for one in pairs]
    if isinstance(choices, dict):
        texts, labels = choices.get("text"), choices.get("label")
        if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
            return texts, [str(label) for label in labels]
    raise RowError("the choices are not texts with labels")


def _set_of(file: str) -> str:
    name = file.lower()
    return "ARC-Easy" if "easy" in name else "ARC-Challenge" if "challenge" in name else ""
