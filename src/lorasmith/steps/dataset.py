"""The run's own copy of the test set, counted, and held against the training files."""

from __future__ import annotations

from lorasmith.files.atomic import write_record
from lorasmith.files.jsonl import read_examples, write_examples
from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics
from lorasmith.stages import Stage
from lorasmith.steps.base import RunContext, Step, numbered


def prepare_test_set(run: RunContext) -> Step:
    """Copy, count, check for contamination."""
    stage = Stage(
        name="test-set",
        inputs={"test_set": run.config.test_set, **numbered("train", run.config.train)},
        parameters={},
        outputs=["testset"],
        action=lambda: _prepare(run),
    )
    return Step(
        "Test set",
        stage,
        {"testset/statistics.json": DatasetStatistics, "testset/contamination.json": ContaminationRecord},
    )


def _prepare(run: RunContext) -> None:
    from lorasmith.testset.check import check
    from lorasmith.testset.statistics import describe

    folder = run.test_set.parent
    write_examples(run.test_set, read_examples(run.config.test_set))
    write_record(folder / "statistics.json", describe(run.test_set))
    if run.config.train:
        check(run.test_set, run.config.train, folder / "contamination.json", progress=run.progress)
    else:
        reason = "no training file was given (--train)"
        record = ContaminationRecord(verdict="not checked", reason=reason)
        write_record(folder / "contamination.json", record)
