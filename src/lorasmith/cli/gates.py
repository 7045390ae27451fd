"""`lorasmith gates`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import say
from lorasmith.cli.options import GateFormat
from lorasmith.errors import UsageError, os_errors

if TYPE_CHECKING:
    from lorasmith.records.release import GateRecord


def gates(
    run: Annotated[
        Path, typer.Argument(help="The run folder, or unpacked validation results.", metavar="RUN")
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file whose gates are judged. [the run's own]", metavar="FILE"),
    ] = None,
    output_format: GateFormat = "text",
    price_per_hour: Annotated[
        float | None, typer.Option(help="Price of the machine in dollars an hour. [as the run recorded it]")
    ] = None,
) -> None:
    """Judge a run again from its records: measured value, threshold and verdict of every gate.

    Exit code 1 when a gate did not pass; a gate without data has not passed. Needs no model and no torch.

    Example: `lorasmith gates demo-output/run --format junit`
    """
    from lorasmith.runs.results import judge_run

    record = judge_run(run, config=config, price_per_hour=price_per_hour)
    print_gates(record, output_format)
    if not record.passed:
        raise typer.Exit(1)


# Verdicts of gates on standard output, in the format that was asked for.


def check_format(name: str) -> None:
    """Raise `UsageError` for an unknown format, before any work is done."""
    from lorasmith.gates.formats import FORMATS

    if name != "text" and name not in FORMATS:
        raise UsageError(f"there is no format {name!r}", expected=f"text, {', '.join(FORMATS)}")


def print_gates(record: GateRecord, name: str) -> None:
    """`github` also appends the table to the job's summary, where GitHub names a file for it."""
    from lorasmith.cli.console import console
    from lorasmith.cli.views import records
    from lorasmith.gates.formats import FORMATS, to_markdown

    check_format(name)
    if name == "text":
        records.show_gates(record, console())
        return
    say(FORMATS[name](record).rstrip("\n"))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if name == "github" and summary:
        with os_errors(summary, "write the job summary"), Path(summary).open("a", encoding="utf-8") as file:
            file.write(to_markdown(record))
