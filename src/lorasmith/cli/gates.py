"""`lorasmith gates`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.options import GateFormat


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
        float | None, typer.Option(help="Of the machine in dollars. [as the run recorded it]")
    ] = None,
) -> None:
    """Judge a run again from its records: measured value, threshold and verdict of every gate.

    Exit code 1 when a gate did not pass; a gate without data has not passed. Needs no model and no torch.

    Example: `lorasmith gates demo-output/run --format junit`
    """
    from lorasmith.cli.judged import print_gates
    from lorasmith.judge import judge

    record = judge(run, config=config, price_per_hour=price_per_hour)
    print_gates(record, output_format)
    if not record.passed:
        raise typer.Exit(1)
