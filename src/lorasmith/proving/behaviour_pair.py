"""Any two models on the same tokens, as adapter and merge are compared; without a grade."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from lorasmith.errors import CheckpointError
from lorasmith.files.journal import Journal
from lorasmith.models.load import LoadedModel
from lorasmith.models.memory import release_memory
from lorasmith.models.session import ScoringOptions, describe_test_set, prepare
from lorasmith.progress import Progress, silent
from lorasmith.proving.behaviour_measure import compare_sides, run_side
from lorasmith.proving.behaviour_statistics import by_group, summarise
from lorasmith.records.base import FileDigest
from lorasmith.records.proof import TokenComparison


def compare_pair(
    load_a: Callable[[], LoadedModel],
    load_b: Callable[[], LoadedModel],
    test_set: Path,
    *,
    device: str = "auto",
    limit: int | None = None,
    progress: Progress = silent,
) -> tuple[TokenComparison, dict[str, dict[str, TokenComparison]], FileDigest]:
    """Model B against model A over all rows and by group, and the digest of the file.

    One model is in memory at a time. Rows are encoded by A's tokenizer, both compute in float32. Raises
    `CheckpointError` for models of different vocabulary.
    """
    options = ScoringOptions(device=device, limit=limit)
    _, route = options.place()
    with TemporaryDirectory(prefix="lorasmith-") as folder, ExitStack() as stack:
        kept = [stack.enter_context(Journal(Path(folder) / name, name, {})) for name in ("a", "b")]
        a = load_a()
        work = prepare(test_set, a, options, route)
        first = run_side(a, work, route, kept[0], "Original", progress)
        del a
        release_memory()
        second = run_side(load_b(), work, route, kept[1], "Compressed", progress)
        if first.vocabulary != second.vocabulary:
            raise CheckpointError(
                f"one model has {first.vocabulary:,} embedding rows, the other {second.vocabulary:,}",
                expected="two models of one vocabulary",
            )
        rows = compare_sides(work, first, second, route, None, progress)
    overall = summarise(rows, options.seed)
    return overall, by_group(work.examples, rows, options.seed), describe_test_set(test_set)
