"""Options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[Path, typer.Option("--base", help="Folder of the base model.", metavar="DIR")]
Adapter = Annotated[Path, typer.Option("--adapter", help="Folder of the LoRA adapter.", metavar="DIR")]
Merged = Annotated[Path, typer.Option("--merged", help="Folder of the merged model.", metavar="DIR")]
TestSet = Annotated[
    Path, typer.Option("--test-set", help="JSONL with prompt, response and metadata.", metavar="FILE")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of tables.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Template = Annotated[
    str, typer.Option(help="How prompts are laid out: auto (the tokenizer's chat template), chat, plain.")
]
PublicKey = Annotated[
    Path | None, typer.Option(help="Public key (PEM) whose signature is required.", metavar="KEY")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
