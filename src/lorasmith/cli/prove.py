"""`lorasmith prove`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.options import AdaptersInput, BaseInput, MergedInput


def prove(
    base: BaseInput,
    adapters: AdaptersInput,
    merged: MergedInput,
    output: Annotated[Path | None, typer.Option(help="File for the record.", metavar="FILE")] = None,
    as_json: AsJson = False,
) -> None:
    """Recompute every element of a merged model independently, and grade the weights.

    Works on merged folders made by other tools as well. Exit code 1 when they are `different`.

    Example: `lorasmith prove --base models/base --adapter models/adapter --merged models/merged`
    """
    import lorasmith
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views import proofs

    proof = lorasmith.prove(
        base.base,
        adapters.adapter,
        merged.merged,
        weights=adapters.weight or None,
        output=output,
        progress=bar,
    )
    if as_json:
        show_record(proof)
    else:
        proofs.show_weights(proof, console())
    if proof.grade == "different":
        raise typer.Exit(1)
