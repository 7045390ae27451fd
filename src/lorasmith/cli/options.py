"""Options of the command line alone; all others are models of `lorasmith.options`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the record as JSON instead of tables.", rich_help_panel="Display"),
]
GateFormat = Annotated[
    str,
    typer.Option(
        "--format",
        help="How gates are printed: text, junit, json, markdown or github.",
        rich_help_panel="Display",
    ),
]
PublicKey = Annotated[
    Path | None, typer.Option(help="Public key (PEM) whose signature is required.", metavar="KEY")
]
