"""The loss that the other boundary between prompt and answer gives, on a sample of the rows that it changes.

A person compares the loss with what a trainer printed. Trainers encode prompt and answer as one text: where
the two share a token, and where the template writes something behind the last answer, they score other
tokens (docs/validation.md). So a few rows are scored both ways, and told where that makes a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lorasmith.errors import DataError
from lorasmith.models.hidden_states import open_scoring
from lorasmith.models.scorer import Scorer
from lorasmith.models.scoring import Floats, row_loss
from lorasmith.models.session import encode_for
from lorasmith.models.text import BOUNDARIES, EncodedSet
from lorasmith.options import ScoringOptions
from lorasmith.records.base import Finding
from lorasmith.records.scoring import OtherBoundary

SAMPLE = 16
"""Rows that are scored both ways: enough to see 1 %, and little beside a test set."""
TOLD_FROM = 0.01
"""Relative difference of the losses from which on it is told."""


def other_boundary(
    scorer: Scorer, options: ScoringOptions, logprobs: Sequence[Floats]
) -> OtherBoundary | None:
    """Score a sample of rows with the other boundary; None where it changes no row, or cannot lay one out.

    `logprobs` are those of all rows with the boundary that is used.
    """
    work = scorer.work
    other = next(name for name in BOUNDARIES if name != options.boundary)
    asked = options.model_copy(update={"boundary": other, "strict": False})
    try:
        encoded = encode_for(asked, work.examples, scorer.loaded)
    except DataError:
        return None
    changed = [
        place
        for place, (one, two) in enumerate(zip(work.rows, encoded.rows, strict=True))
        if one.ids != two.ids or one.spans != two.spans
    ]
    if not changed:
        return None
    chosen = [changed[place] for place in _spread(len(changed), SAMPLE)]
    rows = EncodedSet([encoded.rows[place] for place in chosen], encoded.template, encoded.max_length, other)
    side = replace(
        scorer.here(None),
        work=replace(work, examples=[work.examples[place] for place in chosen], encoded=rows),
    )
    found = side.run(open_scoring, side.work.batches(), "", unit="tok", keep=False)
    return OtherBoundary(
        boundary=other,
        straddling=encoded.straddling,
        changed=len(changed),
        rows=len(chosen),
        loss=_mean([found[place] for place in range(len(chosen))]),
        used_loss=_mean([logprobs[place] for place in chosen]),
    )


def boundary_findings(found: OtherBoundary | None, used: str) -> list[Finding]:
    """A note where the two losses are far apart."""
    if found is None or abs(found.loss - found.used_loss) <= TOLD_FROM * found.used_loss:
        return []
    return [
        Finding(
            severity="note",
            code="other-boundary",
            message=f"the loss is that of --boundary {used}; on {found.rows} of the {found.changed} rows "
            f"that it matters to, --boundary {found.boundary} gives {found.loss:.4f} in place of "
            f"{found.used_loss:.4f}",
            remedy="give --boundary text to compare with what a trainer prints, generation for what the "
            "model is asked in use",
        )
    ]


def _mean(rows: Sequence[Floats]) -> float:
    return float(sum(row_loss(row) for row in rows) / sum(len(row) for row in rows))


def _spread(count: int, wanted: int) -> list[int]:
    """At most so many places, evenly over all."""
    if count <= wanted:
        return list(range(count))
    return np.linspace(0, count - 1, wanted).round().astype(int).tolist()
