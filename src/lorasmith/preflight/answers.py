"""What answering the benchmarks' own questions would take (`--tasks`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.benchmarks.registry import BENCHMARKS
from lorasmith.preflight.sizes import row_lengths
from lorasmith.records.dataset import Example


@dataclass(frozen=True)
class AnswerSize:
    """The questions of a test set, and how long their answers may get."""

    rows: int
    tokens: int
    """Of all questions, templates included."""
    written: int
    """Tokens of all written answers, each as long as its limit: nobody knows where a model stops."""
    together: int
    """Rows that are written at a time: each step reads the weights once for all of them."""


def answer_size(examples: Sequence[Example], base: Path) -> AnswerSize:
    """Of the rows that `--tasks` can put to a model; no rows where there are none."""
    from lorasmith.models.generate import GENERATE_ROWS
    from lorasmith.scoring.answers import RULES

    names = {benchmark.name for benchmark in BENCHMARKS}
    written = [row for row in examples if row.metadata.source in RULES]
    chosen = [
        row
        for row in examples
        if row.metadata.source in names - set(RULES) and "choices" in row.metadata.extra()
    ]
    known = [*written, *chosen]
    limits = [RULES[row.metadata.source].max_new_tokens for row in written]
    pairs, _ = row_lengths(known, base)
    return AnswerSize(
        rows=len(known),
        tokens=sum(prompt for prompt, _ in pairs),
        written=sum(limits),
        together=max(1, min(GENERATE_ROWS, len(limits))),
    )
