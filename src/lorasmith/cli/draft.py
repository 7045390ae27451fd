"""`lorasmith draft train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson, Device, Seed

if TYPE_CHECKING:
    pass


def train(
    target: Annotated[Path, typer.Option(help="Folder of the model that is to be sped up.", metavar="DIR")],
    responses: Annotated[
        Path, typer.Option(help="Its responses, as `lorasmith respond` writes them.", metavar="FILE")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write the draft to.", metavar="DIR")],
    base: Annotated[
        str | None, typer.Option(help="Small model of the same tokenizer: folder or org/name.", metavar="DIR")
    ] = None,
    from_target: Annotated[
        bool, typer.Option("--from-target", help="Begin with layers of the target instead of --base.")
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help="Which layers of the target to keep, such as 0,2,4 or 0-3,8.")
    ] = None,
    cross_entropy_weight: Annotated[float, typer.Option(help="Of the target's tokens in the loss.")] = 1.0,
    kl_weight: Annotated[float, typer.Option(help="Of the target's stored probabilities.")] = 1.0,
    classifier_weight: Annotated[float, typer.Option(help="Of the difficulty classifier.")] = 0.1,
    labels: Annotated[
        str, typer.Option(help="Difficulty: auto, data (metadata.difficulty), confidence (easy/hard), none.")
    ] = "auto",
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-4,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows at most.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Longest row in tokens; longer responses are cut.")] = 1024,
    validation: Annotated[float, typer.Option(help="Fraction of rows that decides when to stop.")] = 0.1,
    held_out: Annotated[float, typer.Option(help="Fraction of rows that only the report sees.")] = 0.1,
    validate_every: Annotated[int, typer.Option(help="Steps between validations and checkpoints.")] = 50,
    patience: Annotated[int, typer.Option(help="Validations without a better one before it stops.")] = 3,
    device: Device = "auto",
    seed: Seed = 42,
    as_json: AsJson = False,
) -> None:
    """Train a draft model on a target's responses: a generator to speculate with, and a classifier.

    A killed training continues when the same command is given again, and ends with the same weights.

    Example: `lorasmith draft train --target models/merged --responses data/responses.jsonl
    --base models/small --output models/draft`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.errors import UsageError
    from lorasmith.followup.drafts.draft import train_draft
    from lorasmith.followup.drafts.start import parse_layers
    from lorasmith.followup.drafts.trainer import DraftSettings

    if from_target != (layers is not None):
        raise UsageError("--from-target and --layers go together", remedy="give both, or --base")
    settings = DraftSettings(
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        cross_entropy_weight=cross_entropy_weight,
        kl_weight=kl_weight,
        classifier_weight=classifier_weight,
        labels=labels,
        validation=validation,
        held_out=held_out,
        validate_every=validate_every,
        patience=patience,
        seed=seed,
    )
    record = train_draft(
        target,
        responses,
        output,
        base=base,
        layers=None if layers is None else parse_layers(layers),
        settings=settings,
        device=device,
        progress=bar,
    )
    if as_json:
        show_record(record)
    else:
        from lorasmith.cli.views.followup import show_draft

        show_draft(record, console())
        console().print(f"Draft: {output}")
