"""`lorasmith train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.options import BaseInput, TrainOptions


def train(
    inputs: BaseInput,
    train_file: Annotated[
        Path, typer.Option("--train", help="JSONL with prompt and response.", metavar="FILE")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write the adapter to.", metavar="DIR")],
    *,
    options: TrainOptions,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter with PEFT on the responses of a JSONL file.

    Example: `lorasmith train --base models/base --train data/train.jsonl --output models/adapter`
    """
    import lorasmith
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views import records

    record = lorasmith.train(inputs.base, train_file, output, options=options, progress=bar)
    if as_json:
        show_record(record)
    else:
        records.show_training(record, console())
        console().print(f"Adapter: {output}", markup=False, soft_wrap=True)
