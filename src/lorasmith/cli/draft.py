"""`lorasmith draft train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.options import DraftOptions, StartOptions, TargetInput


def train(
    target: TargetInput,
    responses: Annotated[
        Path, typer.Option(help="Its responses, as `lorasmith respond` writes them.", metavar="FILE")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write the draft to.", metavar="DIR")],
    *,
    start: StartOptions,
    from_target: Annotated[
        bool,
        typer.Option(
            "--from-target",
            help="Begin with layers of the target instead of --from-model.",
            rich_help_panel="Draft model",
        ),
    ] = False,
    options: DraftOptions,
    as_json: AsJson = False,
) -> None:
    """Train a draft model on a target's responses: a generator to speculate with, and a classifier.

    A killed training continues when the same command is given again, and ends with the same weights.

    Example: `lorasmith draft train --target models/merged --responses data/responses.jsonl
    --from-model models/small --output models/draft`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.errors import UsageError
    from lorasmith.followup.drafts.draft import train_draft
    from lorasmith.followup.drafts.layers import parse_layers

    if from_target != (start.layers is not None):
        raise UsageError("--from-target and --layers go together", remedy="give both, or --from-model")
    record = train_draft(
        target.target,
        responses,
        output,
        from_model=start.from_model,
        layers=None if start.layers is None else parse_layers(start.layers),
        options=options,
        progress=bar,
    )
    if as_json:
        show_record(record)
    else:
        from lorasmith.cli.views.followup import show_draft

        show_draft(record, console())
        console().print(f"Draft: {output}", markup=False, soft_wrap=True)
