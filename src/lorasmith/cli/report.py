"""`lorasmith report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or unpacked validation results.", metavar="RUN")],
    output: Annotated[
        Path | None, typer.Option(help="The page to write (RUN/report.html).", metavar="FILE")
    ] = None,
    timings: Annotated[
        bool, typer.Option("--timings/--no-timings", help="Show the time and memory of each step.")
    ] = True,
) -> None:
    """Make the page of a run again from its records alone: one file, nothing loaded from anywhere.

    Example: `lorasmith report demo-output`
    """
    from lorasmith.cli.console import console
    from lorasmith.files.machine import human_bytes
    from lorasmith.reporting.page import write_report

    page = output or run / "report.html"
    write_report(run, page, timings=timings)
    console().print(f"Report: {page} ({human_bytes(page.stat().st_size)})", markup=False, soft_wrap=True)
