"""Is a test set independent of training data? Exact copies, shared 13-grams and near duplicates, streamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasmith.data.rows import read_examples
from lorasmith.data.sources import local_rows
from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import write_record
from lorasmith.files.jsonl import write_examples
from lorasmith.files.output_folder import require_own_record
from lorasmith.options import OverlapOptions, ReadingOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.records.dataset import ContaminationRecord, Example
from lorasmith.testset.overlap import Matcher
from lorasmith.testset.rows import describe, digest


@documented(OverlapOptions)
def check(
    test_set: Path,
    train: Sequence[Path],
    output: Path | None = None,
    *,
    options: OverlapOptions | None = None,
    drop: bool = False,
    progress: Progress = silent,
    **given: Any,
) -> ContaminationRecord:
    """Compare each test row with each training row (JSONL); writes the record to `output` if given.

    A test row is contaminated when a training row has the same prompt or text but for case, punctuation and
    spacing (`exact`); holds its bare question word by word, in whatever wrapping (`question`); shares at
    least the part `share` of its runs of `ngram` words (`ngram`, runs as in Brown et al. 2020,
    arXiv:2005.14165, appendix C); or has a prompt with a Jaccard similarity of word shingles of at least
    `similarity` (`near`). Runs that many test or training rows hold are boilerplate and count for nothing.
    Smaller shares are listed, and do not count. `drop` removes contaminated rows, atomically.

    Raises `DataError` for unusable files, or when `drop` would leave no row.
    """
    if not train:
        raise UsageError("no training file was given", expected="at least one --train FILE")
    if output is not None:
        require_own_record(output)
    asked = OverlapOptions.given(options, given)
    given_rows, test_set = test_set, local_rows(test_set, asked)
    train = [local_rows(path, asked) for path in train]
    if drop and test_set != given_rows:
        raise UsageError(
            "rows can only be dropped from a file as lorasmith writes it",
            where=given_rows,
            expected="a test set of `lorasmith testset build` or `split`",
            remedy="leave --drop out",
        )
    examples = read_examples(test_set)
    matcher = Matcher(examples, asked)
    digests = [digest(path) for path in train]
    total = sum(file.bytes for file in digests)
    rows = 0
    with progress("Compare with training rows", total=total, unit="B") as advance:
        for path, file in zip(train, digests, strict=True):
            rows += matcher.read(path)
            advance(file.bytes)
    matcher.judge()
    affected = matcher.affected()
    counts = {**matcher.counts, "test_rows": len(affected)}
    verdict, reason = ("contaminated", _reason(affected, examples)) if affected else ("independent", "")
    if affected and drop:
        _drop(test_set, examples, affected)
        counts["dropped"] = len(affected)
        verdict, reason = "independent", f"{len(affected)} contaminated rows were dropped from the test set"
    record = ContaminationRecord(
        verdict=verdict,
        reason=reason,
        test=digest(test_set),
        train=digests,
        rows_test=len(examples) - counts.get("dropped", 0),
        rows_train=rows,
        parameters=asked.model_dump(exclude=set(ReadingOptions.model_fields)),
        counts=counts,
        hits=matcher.hits(),
    )
    if output is not None:
        write_record(output, record)
    return record


def _reason(affected: set[str], examples: Sequence[Example]) -> str:
    return f"{len(affected)} of {len(examples)} test rows are also in the training data"


def _drop(test_set: Path, examples: Sequence[Example], affected: set[str]) -> None:
    kept = [example for example in examples if example.id not in affected]
    if not kept:
        raise DataError(
            "every row of the test set is contaminated: nothing would be left",
            where=test_set,
            remedy="build a test set from other data",
        )
    write_examples(test_set, kept)
    statistics = test_set.parent / "statistics.json"
    if statistics.is_file():
        write_record(statistics, describe(test_set))
