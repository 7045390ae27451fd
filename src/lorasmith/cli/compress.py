"""`lorasmith compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.options import CompressOptions


def compress(
    model: Annotated[Path, typer.Option(help="Folder of the model, in 16 or 32 bits.", metavar="DIR")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write the compressed model to.", metavar="DIR")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only show the sizes that are possible; reads headers alone.")
    ] = False,
    *,
    options: CompressOptions,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", help="Another compressed folder for the table of --report.", metavar="DIR"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page with table and plot of size and quality.", metavar="FILE"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model, and measure what it lost against the original.

    With --plan nothing is written: the sizes that each method gives are computed from the tensors' shapes,
    and a target that nothing reaches ends with 1. A missed gate ends with 1 as well; of several formats one
    has to pass. Needs the extra `compress` (auto-round).

    Example: `lorasmith compress --model models/merged --plan --target-size 540MB`
    """
    from lorasmith.cli.console import console, show_record
    from lorasmith.cli.views.compression import show_plan
    from lorasmith.errors import UsageError
    from lorasmith.followup.compression.sizes import plan_compression

    sizes = None
    if plan or options.target_size is not None:
        sizes = plan_compression(model, target_size=options.target_size)
        if plan and as_json:
            show_record(sizes)
        elif plan or sizes.reachable is False:
            show_plan(sizes, console())
        if sizes.reachable is False:
            raise typer.Exit(1)
        if plan:
            return
    if output is None:
        raise UsageError("there is no place to write to", remedy="give --output DIR, or --plan")
    from lorasmith.followup.compression.settings import every_way

    several = len(every_way(options, options.seed)) > 1
    (_several if several else _one)(model, output, options, beside or [], report, as_json)


def _one(
    model: Path,
    output: Path,
    options: CompressOptions,
    beside: list[Path],
    report: Path | None,
    as_json: bool,
) -> None:
    import lorasmith
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views.compression import show_compressed
    from lorasmith.followup.compression.table import write_page

    record = lorasmith.compress(model, output, options=options, progress=bar)
    if report is not None:
        write_page([*beside, output], report)
    if as_json:
        show_record(record)
    else:
        show_compressed(record, console())
        console().print(f"Compressed model: {output}", markup=False, soft_wrap=True)
    if record.passed is False:
        raise typer.Exit(1)


def _several(
    model: Path,
    output: Path,
    options: CompressOptions,
    beside: list[Path],
    report: Path | None,
    as_json: bool,
) -> None:
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views.compression import show_table
    from lorasmith.followup.compression.table import write_page
    from lorasmith.runs.compression import compress_several

    record = compress_several(model, output, options=options, progress=bar)
    if report is not None:
        write_page([*beside, *(output / name for name in record.folders)], report)
    if as_json:
        show_record(record)
    else:
        show_table(record.compressed, record.reason, console())
        console().print(f"Compressed models: {output}", markup=False, soft_wrap=True)
    if record.recommended is None and any(one.passed is False for one in record.compressed):
        raise typer.Exit(1)
