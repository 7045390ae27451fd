"""`lorasmith train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.options import AsJson, Base, Device, Seed, Template


def train(
    base: Base,
    train_file: Annotated[
        Path, typer.Option("--train", help="JSONL with prompt and response.", metavar="FILE")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write the adapter to.", metavar="DIR")],
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    alpha: Annotated[int, typer.Option(help="LoRA alpha: the update is scaled by alpha / rank.")] = 32,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, or names separated by commas.")
    ] = "all-linear",
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 2e-4,
    epochs: Annotated[float, typer.Option(help="Passes over the training file.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 4,
    max_length: Annotated[int, typer.Option(help="Longest row in tokens; longer ones are cut.")] = 1024,
    template: Template = "auto",
    device: Device = "auto",
    seed: Seed = 42,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter with PEFT on the responses of a JSONL file.

    Example: `lorasmith train --base models/base --train data/train.jsonl --output models/adapter`
    """
    import lorasmith
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views import records
    from lorasmith.training.settings import TrainSettings

    settings = TrainSettings(
        rank=rank,
        alpha=alpha,
        target_modules=target_modules,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        template=template,
        seed=seed,
    )
    record = lorasmith.train(base, train_file, output, settings=settings, device=device, progress=bar)
    if as_json:
        show_record(record)
    else:
        records.show_training(record, console())
        console().print(f"Adapter: {output}")
