"""`lorasmith speculate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson, Device, Template

if TYPE_CHECKING:
    pass


def speculate(
    target: Annotated[Path, typer.Option(help="Folder of the model to speed up.", metavar="DIR")],
    prompts: Annotated[Path, typer.Option(help="JSONL with prompts.", metavar="FILE")],
    draft: Annotated[
        Path | None,
        typer.Option(help="Folder of the draft model; without it only prompt lookup.", metavar="DIR"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON to write the record to.", metavar="FILE")] = None,
    draft_tokens: Annotated[str, typer.Option(help="Lengths of a draft, separated by commas.")] = "2,4,6",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    limit: Annotated[int, typer.Option(help="Prompts from the beginning of the file.")] = 20,
    template: Template = "auto",
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Test speculative decoding: same output as greedy, acceptance, speed measured and predicted.

    Exits 1 when a text differs from greedy decoding for another reason than a tie.

    Example: `lorasmith speculate --target merged --draft draft --prompts test.jsonl --output s.json`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.errors import ExitCode, UsageError
    from lorasmith.followup.speculation.speculate import SpeculateOptions
    from lorasmith.followup.speculation.speculate import speculate as measure

    try:
        lengths = tuple(int(part) for part in draft_tokens.split(","))
    except ValueError as error:
        raise UsageError(
            f"--draft-tokens is {draft_tokens!r}", expected="numbers separated by commas"
        ) from error
    options = SpeculateOptions(lengths, max_new_tokens, limit, template, device, dtype)
    record, timing = measure(target, prompts, draft=draft, output=output, options=options, progress=bar)
    if as_json:
        show_record(record)
    else:
        from lorasmith.cli.views.followup import show_speculation

        show_speculation(record, timing, console())
    if any(setting.different for setting in record.settings):
        raise typer.Exit(ExitCode.ANSWER_IS_NO)
