"""`lorasmith report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, or unpacked validation results; several are compared.", metavar="RUN"
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page to write (RUN/report.html; comparison.html for several).", metavar="FILE"
        ),
    ] = None,
    timings: Annotated[
        bool, typer.Option("--timings/--no-timings", help="Show the time and memory of each step.")
    ] = True,
) -> None:
    """Make the page of a run again from its records alone: one file, nothing loaded from anywhere.

    Given several runs, one page compares them: verdicts, losses, merges, and what differs between them.

    Example: `lorasmith report demo-output`
    """
    from lorasmith.cli.console import console
    from lorasmith.machine.resources import human_bytes

    if len(runs) == 1:
        from lorasmith.cli.package import say_signature_is_gone
        from lorasmith.files.digests import reseal
        from lorasmith.reporting.page import write_report

        page = output or runs[0] / "report.html"
        write_report(runs[0], page, timings=timings)
        if reseal(runs[0], page):
            say_signature_is_gone()
    else:
        from lorasmith.reporting.several import write_comparison

        page = output or Path("comparison.html")
        write_comparison(runs, page, timings=timings)
    console().print(f"Report: {page} ({human_bytes(page.stat().st_size)})", markup=False, soft_wrap=True)
