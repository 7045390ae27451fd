"""`lorasmith compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.records.compression import SizePlan


def compress(
    model: Annotated[Path, typer.Option(help="Folder of the model, in 16 or 32 bits.", metavar="DIR")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Only show the sizes that are possible; reads headers alone.")
    ] = False,
    target_size: Annotated[
        str | None, typer.Option(help="Wanted size, such as 540MB or 4GB; refused where nothing reaches it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show to which sizes a model can be quantized, before it is done.

    Example: `lorasmith compress --model models/merged --plan --target-size 540MB`
    """
    from lorasmith.cli.console import show_record
    from lorasmith.followup.sizes_plan import plan_compression

    sizes = plan_compression(model, target_size=target_size)
    if as_json:
        show_record(sizes)
    else:
        _show_plan(sizes)
    if sizes.reachable is False:
        raise typer.Exit(1)


def _show_plan(sizes: SizePlan) -> None:
    """The table of methods, and what they mean for the target."""
    from lorasmith.cli.console import console, table
    from lorasmith.files.machine import human_bytes

    screen = console()
    tied = ", tied" if sizes.tied else ""
    screen.print(
        f"{sizes.architecture}: {sizes.parameters:,} parameters "
        f"({sizes.embedding_parameters:,} in embeddings{tied}), {human_bytes(sizes.bytes)} in 16 bits",
        soft_wrap=True,
    )
    rows = [
        (
            one.method,
            human_bytes(one.bytes),
            f"{one.bits_per_weight:.2f}",
            one.embeddings,
            one.format or "",
            *(() if one.fits is None else ("yes" if one.fits else "no",)),
        )
        for one in sizes.methods
    ]
    columns = ["method", "size", "bits per weight", "embeddings", "--format"]
    columns += [] if sizes.target_bytes is None else ["fits"]
    screen.print(table("What each method makes of it", columns, rows))
    for line in sizes.advice:
        screen.print(line, soft_wrap=True)
