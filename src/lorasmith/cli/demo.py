"""`lorasmith demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorasmith.options import SeedOptions


def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.", metavar="DIR")],
    *,
    options: SeedOptions,
    followup: Annotated[
        bool,
        typer.Option(
            "--followup", help="Go on after the release: responses, draft model, speculation, fewer bits."
        ),
    ] = False,
    quantized: Annotated[
        bool,
        typer.Option(
            "--quantized", help="Merge into the 4-bit file that the model is shipped as, in every rounding."
        ),
    ] = False,
) -> None:
    """Fine-tune, validate, merge, prove and package a real small model, offline, in some minutes.

    Ends with exit code 0 even when gates fail (it shows what was measured), and 1 only if the merged
    weights are not the merge.

    Example: `lorasmith demo --output demo-output`
    """
    from lorasmith.cli.views import records
    from lorasmith.cli.views.run import TerminalWatcher, show_summary
    from lorasmith.errors import UsageError
    from lorasmith.runs.demo import demo as make
    from lorasmith.runs.demo import quantized_demo
    from lorasmith.runs.stages import read_timings

    watcher = TerminalWatcher()
    if quantized:
        if followup:
            raise UsageError("--quantized ends with the merge", expected="one of --quantized and --followup")
        records.show_roundings(quantized_demo(output, seed=options.seed, watcher=watcher), watcher.screen)
        return
    result = make(output, seed=options.seed, followup=followup, watcher=watcher)
    timings = [*read_timings(output).values(), *read_timings(result.run.folder).values()]
    records.show_timings(timings, watcher.screen)
    show_summary(result.run, watcher.screen)
    if result.run.weights.grade == "different":
        raise typer.Exit(1)
