"""Four choices under letters: the prompt, which letter an answer names, and the likeliest letter."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from lorasmith.benchmarks.base import RowError, Scores, Unscored, canonical
from lorasmith.records.dataset import Example

LETTERS = "ABCD"

CHOICE_NEEDS = {
    "choices": Annotated[list[str], Field(min_length=len(LETTERS), max_length=len(LETTERS))],
    "answer": Literal["A", "B", "C", "D"],
}
"""What a verdict on a letter reads of a row."""

# A lower-case "a" is an article: "the answer is a force" names no letter.
_STATED = re.compile(r"""\b(?i:answer)[\s:*]*(?:(?i:is)\b)?[\s:*("'\[]*([A-Db-d])\b(?!['’])""")
_ALONE = re.compile(r"^[\s*(\[]*(?:(?i:option|choice)\s+)?[*(\[]*([A-D])[*\])]*(?:[.:,)]|\s*(?:\n|$))")
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-D])\b")


def prompt_of(question: str, choices: Sequence[str]) -> str:
    """The question, the lettered choices and `Answer:`, as the MMLU paper prints them."""
    lines = [
        question.strip(),
        *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)),
    ]
    return "\n".join([*lines, "Answer:"])


def require_choices(choices: Sequence[object]) -> list[str]:
    """Four different texts, else `RowError`."""
    texts = [choice.strip() for choice in choices if isinstance(choice, str) and choice.strip()]
    if len(choices) != len(LETTERS) or len(texts) != len(LETTERS):
        raise RowError("there are not four choices with a text")
    return texts


def read_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter an answer names: boxed, stated ("the answer is C"), at its start, or by a choice's text.

    The last statement counts, since models reason first. None when nothing of this is there.
    """
    for pattern in (_BOXED, _STATED):
        letters = pattern.findall(answer)
        if letters:
            return str(letters[-1]).upper()
    alone = _ALONE.match(answer.strip())
    if alone:
        return alone.group(1)
    plain = answer.strip().rstrip(".").casefold()
    for letter, choice in zip(LETTERS, choices, strict=True):
        if plain == choice.strip().rstrip(".").casefold():
            return letter
    return None


def judge_letter(example: Example, answer: str) -> Scores:
    """Accuracy of one answer: 1.0 for the right letter, 0.0 for another one or none."""
    extra = example.metadata.extra()
    if "choices" not in extra:
        raise Unscored("this file holds no choices, so there is no four-way accuracy")
    return {"accuracy": float(read_letter(answer, extra["choices"]) == extra["answer"])}


def judge_likelihoods(example: Example, log_likelihoods: Sequence[float]) -> Scores:
    """Accuracy from the log-likelihood of each continuation (nats); the first of equals counts."""
    best = max(range(len(log_likelihoods)), key=lambda index: (log_likelihoods[index], -index))
    return {"accuracy": float(LETTERS[best] == example.metadata.extra()["answer"])}


def seeded_order(seed: int, record_id: str, choices: Sequence[str]) -> list[int]:
    """A fixed order per seed and row, the same on every machine."""

    def rank(index: int) -> bytes:
        return hashlib.sha256(canonical([seed, record_id, choices[index]])).digest()

    return sorted(range(len(choices)), key=rank)
