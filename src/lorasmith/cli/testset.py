"""`lorasmith testset build | split | check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson, Seed, TestSet

if TYPE_CHECKING:
    from rich.console import Console

    from lorasmith.records.dataset import DatasetStatistics, SplitRecord


def build(
    benchmarks: Annotated[
        Path, typer.Option(help="Folder (or file) with your copies of the benchmarks.", metavar="DIR")
    ],
    output: Annotated[
        Path, typer.Option(help="The test set; statistics.json and findings.json beside it.", metavar="FILE")
    ],
    samples_per_benchmark: Annotated[int, typer.Option(help="Rows of each benchmark.")] = 100,
    samples: Annotated[
        list[str] | None, typer.Option(help="Rows of one benchmark, such as MATH=50; give it again for more.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Names of benchmarks, with commas or given again. [all five]")
    ] = None,
    difficulty: Annotated[str, typer.Option(help="guide, native or measured.")] = "guide",
    losses: Annotated[
        Path | None,
        typer.Option(help="For measured: base.parquet of a validation of this test set.", metavar="FILE"),
    ] = None,
    seed: Seed = 42,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="Stop at anything wrong with the files.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Build a test set from DROP, GPQA, HumanEval, MATH and MMLU, recognised by content.

    The same seed gives the same bytes on every machine; no benchmark changes another's rows.

    Example: `lorasmith testset build --benchmarks data/benchmarks --output test_set.jsonl`
    """
    from lorasmith.benchmarks.registry import choose
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.testset.build import build as build_test_set
    from lorasmith.testset.difficulty import read_losses

    names = _names(only)
    sizes = {benchmark.name: samples_per_benchmark for benchmark in choose(names)}
    record = build_test_set(
        benchmarks,
        output,
        samples_per_benchmark=sizes | _sizes(samples or []),
        only=names,
        difficulty=difficulty,
        losses=read_losses(losses) if losses else None,
        seed=seed,
        strict=strict,
        progress=bar,
    )
    if as_json:
        show_record(record)
    else:
        show_counts(record, console())


def split(
    train: Annotated[Path, typer.Option(help="Training file (JSONL).", metavar="FILE")],
    output: Annotated[Path, typer.Option(help="The hold-out; split.json beside it.", metavar="FILE")],
    size: Annotated[int, typer.Option(help="Rows to hold out, exactly.")] = 200,
    stratify_by: Annotated[str, typer.Option(help="Fields, with commas.")] = "difficulty,domain",
    seed: Seed = 42,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take the rows out of the training file, atomically.")
    ] = False,
    backup: Annotated[
        bool, typer.Option("--backup/--no-backup", help="With --remove: keep the training file as it was.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Hold out a stratified test set from a training file, which stays as it is unless --remove is given.

    Example: `lorasmith testset split --train train.jsonl --size 200 --output test_set.jsonl`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.testset.split import split as split_file

    fields = [name.strip() for name in stratify_by.split(",") if name.strip()]
    record = split_file(
        train,
        output,
        size=size,
        stratify_by=fields,
        seed=seed,
        remove=remove,
        backup=backup,
        progress=bar,
    )
    if as_json:
        show_record(record)
    else:
        show_split(record, console())


def check(
    test_set: TestSet,
    train: Annotated[
        list[Path], typer.Option("--train", help="Training file (JSONL); give all of them.", metavar="FILE")
    ],
    output: Annotated[Path | None, typer.Option(help="File for the record.", metavar="FILE")] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Remove contaminated rows from the test set.")] = False,
    ngram: Annotated[int, typer.Option(help="Words in a row that count as copied.")] = 13,
    similarity: Annotated[float, typer.Option(help="Jaccard similarity that counts as near.")] = 0.8,
    allow: Annotated[int, typer.Option(help="Contaminated rows that are tolerated.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Look for test rows in training data: exact copies, shared runs of words, near duplicates.

    Exit code 1 when more rows than allowed are contaminated and they were not dropped.

    Example: `lorasmith testset check --test-set test_set.jsonl --train train.jsonl`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views import records
    from lorasmith.testset.check import check as check_test_set
    from lorasmith.testset.overlap import Settings

    settings = Settings(ngram=ngram, similarity=similarity)
    record = check_test_set(test_set, train, output, settings=settings, drop=drop, progress=bar)
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


def _names(only: list[str] | None) -> list[str] | None:
    if not only:
        return None
    return [name.strip() for entry in only for name in entry.split(",") if name.strip()]


def _sizes(samples: list[str]) -> dict[str, int]:
    from lorasmith.benchmarks.registry import by_name
    from lorasmith.errors import UsageError

    sizes: dict[str, int] = {}
    for entry in samples:
        name, _, size = entry.partition("=")
        if not size.strip().lstrip("-").isdigit():
            raise UsageError(f"--samples {entry!r} gives no size", expected="NAME=ROWS, such as MATH=50")
        sizes[by_name(name).name] = int(size)
    return sizes
