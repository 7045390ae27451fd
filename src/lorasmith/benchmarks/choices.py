"""Choices under letters: the prompt, which letter an answer names, and the likeliest letter."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lorasmith.benchmarks.base import Benchmark, RowError, Scores, Unscored, canonical
from lorasmith.records.dataset import Example

LETTERS = "ABCDEFGHIJ"
"""As many as the longest list of choices has (MMLU-Pro)."""


def choice_needs(fewest: int, most: int) -> dict[str, Any]:
    """What a verdict on a letter reads of a row with so many choices."""
    return {
        "choices": Annotated[list[str], Field(min_length=fewest, max_length=most)],
        "answer": Literal[tuple(LETTERS[:most])],
    }


class LetteredChoices(Benchmark):
    """A benchmark of questions with choices under letters: right when the letter is."""

    answered_by = "letter"
    needs: ClassVar[Mapping[str, Any]] = choice_needs(4, 4)

    def question_in(self, prompt: str) -> tuple[str, str]:
        return "", prompt.partition("\nA. ")[0].strip()

    def judge(self, example: Example, answer: str) -> Scores:
        return judge_letter(example, answer)

    def judge_likelihoods(self, example: Example, likelihoods: Sequence[float]) -> Scores:
        return judge_likelihoods(example, likelihoods)


@cache
def _patterns(count: int) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """A letter of `count` that is boxed, stated, or stands alone at the start."""
    last = LETTERS[count - 1]
    # A lower-case "a" is an article: "the answer is a force" names no letter.
    either = rf"[A-{last}b-{last.lower()}]"
    return (
        re.compile(rf"\\boxed\{{\s*(?:\\\w+\s*\{{\s*){{0,3}}\(?([A-{last}])\b"),
        re.compile(
            rf"""\b(?i:(?:correct\s+)?(?:answer|option|choice))(?:(?i:\s+is)\b|[\s:*]*:)?[\s:*("'\[$]*+(?:(?i:option|choice)\s+)?[("'\[$]*({either})\b(?!['’])"""
        ),
        re.compile(
            rf"^[\s*(\[$]*+(?:(?i:option|choice)\s+)?[*(\[$]*([A-{last}])[*\])$]*(?:[.:,)]|\s*(?:\n|$))"
        ),
    )


def prompt_of(question: str, choices: Sequence[str]) -> str:
    """The question, the lettered choices and `Answer:`, as the MMLU paper prints them."""
    lines = [
        question.strip(),
        *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)),
    ]
    return "\n".join([*lines, "Answer:"])


def require_choices(choices: Sequence[object], fewest: int = 4, most: int = 4) -> list[str]:
    """So many texts that are not blank, else `RowError`."""
    texts = [choice.strip() for choice in choices if isinstance(choice, str) and choice.strip()]
    if len(texts) != len(choices) or not fewest <= len(texts) <= most:
        wanted = "four" if fewest == most == 4 else f"{fewest} to {most}"
        raise RowError(f"there are not {wanted} choices with a text")
    return texts


_COLUMNS = re.compile(r"(?:choice|option)_?([0-9a-j])", re.IGNORECASE)


def listed_choices(row: Mapping[str, Any]) -> list[Any] | None:
    """The choices of a row in any of the layouts in use; None where it has none.

    `choices` or `options` as a list, as `{"text": […], "label": […]}` or as `{"A": …, "B": …}`; columns
    `choice0` … or `option_a` …; columns A, B, C, D.
    """
    fields = {str(name).lower(): value for name, value in row.items()}
    for name in ("choices", "options"):
        held = fields.get(name)
        if isinstance(held, list):
            return held
        if isinstance(held, Mapping):
            texts = held.get("text", list(held.values()))
            return list(texts) if isinstance(texts, list) else None
    numbered = sorted((found[1].lower(), name) for name in fields if (found := _COLUMNS.fullmatch(name)))
    if len(numbered) > 1:
        return [fields[name] for _, name in numbered]
    if set("abcd") <= fields.keys():
        return [fields[letter] for letter in "abcdefghij" if letter in fields]
    return None


def letter_of(answer: object, choices: Sequence[str]) -> str:
    """The letter of the right choice, from a letter, a number from 0, or the choice's own text."""
    letters = LETTERS[: len(choices)]
    if not isinstance(answer, bool) and isinstance(answer, int | str):
        plain = str(answer).strip()
        if plain.strip("().").upper() in tuple(letters):
            return plain.strip("().").upper()
        if plain.isdigit() and int(plain) < len(choices):
            return letters[int(plain)]
        if [choice.strip() for choice in choices].count(plain) == 1:
            return letters[[choice.strip() for choice in choices].index(plain)]
    raise RowError(f"the answer is neither 0..{len(choices) - 1} nor a letter A..{letters[-1]}")


def read_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter an answer names: boxed, stated ("the answer is C"), at its start, or by a choice's text.

    The last statement counts, since models reason first. None when nothing of this is there.
    """
    boxed, stated, alone = _patterns(len(choices))
    for pattern in (boxed, stated):
        letters = pattern.findall(answer)
        if letters:
            return str(letters[-1]).upper()
    if at_start := alone.match(answer.strip()):
        return at_start.group(1)
    plain = answer.strip().rstrip(".").casefold()
    for letter, choice in zip(LETTERS, choices, strict=False):
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
