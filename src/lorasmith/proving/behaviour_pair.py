"""Any two models on the same tokens, as adapter and merge are compared; without a grade."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from lorasmith.errors import CheckpointError
from lorasmith.models.inputs import Inputs
from lorasmith.models.memory import release_memory
from lorasmith.models.session import ScoringOptions, open_journal, prepare, route_of
from lorasmith.progress import Progress, silent
from lorasmith.proving.behaviour_measure import compare_sides, run_side
from lorasmith.proving.behaviour_statistics import by_group, summarise
from lorasmith.records.base import FileDigest
from lorasmith.records.proof import TokenComparison


def compare_pair(
    a: Path,
    b: Path,
    test_set: Path,
    *,
    work: Path,
    device: str = "auto",
    limit: int | None = None,
    progress: Progress = silent,
) -> tuple[TokenComparison, dict[str, dict[str, TokenComparison]], FileDigest]:
    """The model in folder B against that in A over all rows and by group, and the digest of the file.

    One model is in memory at a time. Rows are encoded by A's tokenizer, both compute in float32. What is
    computed is kept in the folder `work`: a killed comparison goes on from it, and another one of the same
    original does not compute that again. Raises `CheckpointError` for models of different vocabulary.
    """
    options = ScoringOptions(device=device, limit=limit)
    of_a, of_both = Inputs.of([a], test_set), Inputs.of([a, b], test_set)
    with ExitStack() as stack:
        # B's results are kept with the digest of A as well: both go by A's route of the arithmetic.
        kept = []
        for name, inputs in (("original", of_a), ("compressed", of_both), ("pairs", of_both)):
            journal = stack.enter_context(open_journal(work / f".{name}.journal", inputs, options))
            assert journal is not None  # there is a path
            kept.append(journal)
        route = route_of(options, kept[0])
        original = options.load(a)
        load = prepare(test_set, original, options, route)
        first = run_side(original, load, route, kept[0], "Original", progress)
        del original
        release_memory()
        second = run_side(options.load(b), load, route, kept[1], "Compressed", progress)
        if first.vocabulary != second.vocabulary:
            raise CheckpointError(
                f"one model has {first.vocabulary:,} embedding rows, the other {second.vocabulary:,}",
                expected="two models of one vocabulary",
            )
        rows = compare_sides(load, first, second, route, kept[2], progress)
    of_both.require_unchanged()
    overall = summarise(rows, options.seed)
    return overall, by_group(load.examples, rows, options.seed), of_both.file
