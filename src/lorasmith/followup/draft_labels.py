"""Which responses train, decide and are held out, and how difficult each prompt is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorasmith.errors import UsageError
from lorasmith.followup.draft_rows import UNLABELLED, DraftRow

LABELS = ("auto", "data", "confidence", "none")


@dataclass(frozen=True)
class Split:
    """Indices of the rows that train, that decide when to stop, and that only the report sees."""

    train: list[int]
    validation: list[int]
    held_out: list[int]


def split_rows(count: int, *, validation: float, held_out: float, seed: int) -> Split:
    """A seeded split; validation and held-out rows get at least one each, and so does training.

    Raises `UsageError` for fractions that leave nothing to train on.
    """
    sizes = [max(1, round(count * part)) for part in (validation, held_out)]
    if min(validation, held_out) <= 0 or sum(sizes) >= count:
        raise UsageError(
            f"--validation {validation:g} and --held-out {held_out:g} of {count} rows leave none to train on",
            expected="two fractions above 0 whose sum is well below 1",
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count).tolist()
    return Split(sorted(order[sum(sizes) :]), order[: sizes[0]], order[sizes[0] : sum(sizes)])


def label_rows(
    rows: Sequence[DraftRow], train: Sequence[int], asked: str
) -> tuple[list[DraftRow], list[str], str]:
    """The rows with their labels, the labels' names, and where they come from (`none` for no classifier).

    `confidence` cuts the target's mean log-probability at the median of the training rows: below it is hard.
    Raises `UsageError` where labels are asked for that the rows do not have.
    """
    if asked not in LABELS:
        raise UsageError(f"there are no labels {asked!r}", expected=" | ".join(LABELS))
    names = sorted({rows[index].difficulty for index in train} - {UNLABELLED})
    confident = [value for index in train if (value := rows[index].confidence) is not None]
    if asked == "data" and len(names) < 2:
        raise UsageError(
            f"the training rows have {len(names)} difficulty label(s)",
            expected="two or more values of metadata.difficulty",
            remedy="give --labels confidence or --labels none",
        )
    if asked == "confidence" and not confident:
        raise UsageError(
            "the responses have no stored probabilities to tell their difficulty by",
            remedy="extract them with --top-logprobs, or give --labels data",
        )
    if asked == "data" or (asked == "auto" and len(names) > 1):
        place = {name: index for index, name in enumerate(names)}
        return [replace(row, label=place.get(row.difficulty, -1)) for row in rows], names, "data"
    if asked == "confidence" or (asked == "auto" and confident):
        middle = float(np.median(confident))
        labels = [-1 if row.confidence is None else int(row.confidence < middle) for row in rows]
        return (
            [replace(row, label=label) for row, label in zip(rows, labels, strict=True)],
            ["easy", "hard"],
            "confidence",
        )
    return list(rows), [], "none"
