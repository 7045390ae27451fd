"""`lorasmith testset build | split | check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from rich.console import Console

    from lorasmith.options import BuildOptions, OverlapOptions, RowsInput, SplitOptions
    from lorasmith.records.dataset import DatasetStatistics, SplitRecord


def build(
    benchmarks: Annotated[
        Path, typer.Option(help="Folder (or file) with your copies of the benchmarks.", metavar="DIR")
    ],
    output: Annotated[
        Path, typer.Option(help="The test set; statistics.json and findings.json beside it.", metavar="FILE")
    ],
    losses: Annotated[
        Path | None,
        typer.Option(
            help="Losses for --difficulty measured: base.parquet of a validation of this test set.",
            metavar="FILE",
        ),
    ] = None,
    *,
    options: BuildOptions,
    as_json: AsJson = False,
) -> None:
    """Build a test set from DROP, GPQA, HumanEval, MATH and MMLU, or those named, recognised by content.

    The same seed gives the same bytes on every machine; no benchmark changes another's rows.

    Example: `lorasmith testset build --benchmarks data/benchmarks --output test_set.jsonl`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.testset.build import build as build_test_set
    from lorasmith.testset.difficulty import read_losses

    found = read_losses(losses) if losses else None
    record = build_test_set(benchmarks, output, options=options, losses=found, progress=bar)
    if as_json:
        show_record(record)
    else:
        show_counts(record, console())


def split(
    train: Annotated[Path, typer.Option(help="Training file (JSONL).", metavar="FILE")],
    output: Annotated[Path, typer.Option(help="The hold-out; split.json beside it.", metavar="FILE")],
    *,
    options: SplitOptions,
    as_json: AsJson = False,
) -> None:
    """Hold out a stratified test set from a training file, which stays as it is unless --remove is given.

    Example: `lorasmith testset split --train train.jsonl --size 200 --output test_set.jsonl`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.testset.split import split as split_file

    record = split_file(train, output, options=options, progress=bar)
    if as_json:
        show_record(record)
    else:
        show_split(record, console())


def check(
    rows: RowsInput,
    train: Annotated[
        list[Path], typer.Option("--train", help="Training file (JSONL); give all of them.", metavar="FILE")
    ],
    output: Annotated[Path | None, typer.Option(help="File for the record.", metavar="FILE")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Remove contaminated rows from the test set.")] = False,
    allow: Annotated[int, typer.Option(help="Number of contaminated rows that are tolerated.")] = 0,
    *,
    options: OverlapOptions,
    as_json: AsJson = False,
) -> None:
    """Look for test rows in training data: exact copies, shared runs of words, near duplicates.

    Exit code 1 when more rows than allowed are contaminated and they were not dropped.

    Example: `lorasmith testset check --test-set test_set.jsonl --train train.jsonl`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views import records
    from lorasmith.testset.check import check as check_test_set

    record = check_test_set(rows.test_set, train, output, options=options, drop=drop, progress=bar)
    if as_json:
        show_record(record)
    else:
        records.show_contamination(record, console())
    if record.verdict == "contaminated" and record.counts["test_rows"] > allow:
        raise typer.Exit(1)


def show_counts(record: DatasetStatistics, screen: Console) -> None:
    """The counts by group, and the crossing of source and difficulty."""
    from lorasmith.cli.console import table
    from lorasmith.cli.views import records

    records.show_statistics(record, screen)
    levels = list(record.by_difficulty)
    crossing = record.crossings["source × difficulty"]
    rows = [
        [source, *(str(crossing.get(f"{source} / {level}", 0)) for level in levels), str(total)]
        for source, total in record.by_source.items()
    ]
    rows.append(["all", *(str(record.by_difficulty[level]) for level in levels), str(record.examples)])
    screen.print(table("Source by difficulty", ("source", *levels, "all"), rows))


def show_split(record: SplitRecord, screen: Console) -> None:
    """What was held out of each stratum, and what became of the training file."""
    from lorasmith.cli.console import table
    from lorasmith.cli.views import records

    rows = [[name, str(counts["rows"]), str(counts["held_out"])] for name, counts in record.strata.items()]
    screen.print(table(f"{record.size} rows held out", ("stratum", "training rows", "held out"), rows))
    if record.removed_from_train:
        kept = f", kept as {record.backup}" if record.backup else ", without a backup"
        screen.print(f"{record.rows_removed} rows were removed from {record.train.path}{kept}", markup=False)
    else:
        screen.print(f"{record.train.path} was left as it is (--remove takes the rows out)", markup=False)
    records.show_findings(record.findings, screen)
