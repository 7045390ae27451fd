"""Any two loaded models on the same tokens, as adapter and merge are compared; without a grade."""

from __future__ import annotations

from pathlib import Path

from lorasmith.errors import CheckpointError
from lorasmith.models.load import LoadedModel
from lorasmith.models.session import ScoringOptions, describe_test_set, prepare
from lorasmith.progress import Progress, silent
from lorasmith.proving.behaviour_measure import measure
from lorasmith.proving.behaviour_statistics import by_group, summarise
from lorasmith.records.base import FileDigest
from lorasmith.records.proof import TokenComparison


def compare_pair(
    a: LoadedModel,
    b: LoadedModel,
    test_set: Path,
    *,
    limit: int | None = None,
    progress: Progress = silent,
) -> tuple[TokenComparison, dict[str, dict[str, TokenComparison]], FileDigest]:
    """Model B against model A over all rows and by group, and the digest of the file.

    Rows are encoded by A's tokenizer, both models compute in float32. Raises `CheckpointError` for models of
    different vocabulary.
    """
    if a.vocabulary != b.vocabulary:
        raise CheckpointError(
            f"one model has {a.vocabulary:,} embedding rows, the other {b.vocabulary:,}",
            expected="two models of one vocabulary",
        )
    options = ScoringOptions(device=str(a.device), limit=limit)
    _, route = options.place()
    work = prepare(test_set, a, options, route)
    measured = measure(work, a, b, route, None, progress)
    overall = summarise(measured.rows, options.seed)
    return overall, by_group(work.examples, measured.rows, options.seed), describe_test_set(test_set)
