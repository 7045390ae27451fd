"""`lorasmith speculate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.options import SpeculateOptions, TargetInput


def speculate(
    target: TargetInput,
    prompts: Annotated[Path, typer.Option(help="JSONL with prompts.", metavar="FILE")],
    draft: Annotated[
        Path | None,
        typer.Option(help="Folder of the draft model; without it only prompt lookup.", metavar="DIR"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON to write the record to.", metavar="FILE")] = None,
    *,
    options: SpeculateOptions,
    as_json: AsJson = False,
) -> None:
    """Test speculative decoding: same output as greedy, acceptance, speed measured and predicted.

    Exits 1 when a text differs from greedy decoding for another reason than a tie.

    Example: `lorasmith speculate --target merged --draft draft --prompts test.jsonl --output s.json`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.errors import ExitCode
    from lorasmith.followup.speculation.speculate import speculate as measure

    record, timing = measure(
        target.target, prompts, draft=draft, output=output, options=options, progress=bar
    )
    if as_json:
        show_record(record)
    else:
        from lorasmith.cli.views.followup import show_speculation

        show_speculation(record, timing, console())
    if any(setting.different for setting in record.settings):
        raise typer.Exit(ExitCode.ANSWER_IS_NO)
