"""`lorasmith compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson, Device, Limit

if TYPE_CHECKING:
    from lorasmith.followup.compression.settings import CompressOptions, CompressSettings

_Rows = Annotated[
    Path | None,
    typer.Option(help="JSONL with prompt and response that calibrates; local.", metavar="FILE"),
]
_Tests = Annotated[Path | None, typer.Option(help="JSONL on which the quality is measured.", metavar="FILE")]


def compress(
    model: Annotated[Path, typer.Option(help="Folder of the model, in 16 or 32 bits.", metavar="DIR")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write the compressed model to.", metavar="DIR")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only show the sizes that are possible; reads headers alone.")
    ] = False,
    target_size: Annotated[
        str | None,
        typer.Option(help="Wanted size, such as 540MB or 4GB, a gate too; refused where nothing reaches it."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="rtn (round to nearest, the default), or calibrated (on rows of --calibration)."),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="compressed-tensors (the default), gguf:q4_0, gguf:q4_k_m, gguf:q5_k_m, gguf:q6_k or "
            "gguf:q8_0. "
            "Several formats, methods or bits: every combination, each in a folder below --output.",
        ),
    ] = None,
    bits: Annotated[
        list[int] | None, typer.Option(help="Bits of a weight in compressed-tensors: 4, 8, or both. [4]")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale. [the largest of 128, 64, 32 that fits]")
    ] = None,
    calibration: _Rows = None,
    calibration_rows: Annotated[int, typer.Option(help="Samples that calibrate.")] = 128,
    calibration_length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
    iterations: Annotated[int, typer.Option(help="Steps for each block when calibrated.")] = 200,
    test_set: _Tests = None,
    limit: Limit = None,
    max_perplexity_ratio: Annotated[float, typer.Option(help="Gate on the quality.")] = 1.05,
    max_mean_kl: Annotated[float, typer.Option(help="Gate on the quality, in nats.")] = 0.05,
    max_q99_kl: Annotated[
        float | None, typer.Option(help="Gate on the 99 % quantile of the KL, in nats.")
    ] = None,
    min_top1: Annotated[float, typer.Option(help="Gate on the quality, 0..1.")] = 0.9,
    tasks: Annotated[
        bool,
        typer.Option("--tasks/--no-tasks", help="Put the benchmarks' questions of the test set as well."),
    ] = True,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(help="Gate on the accuracy lost over them, 0..1. [0.05 where there are questions]"),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", help="Another compressed folder for the table of --report.", metavar="DIR"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page with table and plot of size and quality.", metavar="FILE"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 42,
    device: Device = "auto",
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
    if plan or target_size is not None:
        sizes = plan_compression(model, target_size=target_size)
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
    from lorasmith.followup.compression.settings import CompressOptions, every_way

    limits = {
        "perplexity_ratio": max_perplexity_ratio,
        "mean_kl": max_mean_kl,
        "top1_agreement": min_top1,
        "accuracy_drop": max_accuracy_drop,
        "q99_kl": max_q99_kl,
        "bytes": None if sizes is None else sizes.target_bytes,
    }
    ways = every_way(
        form or ["compressed-tensors"],
        method or ["rtn"],
        bits or [],
        group_size,
        iterations=iterations,
        calibration_rows=calibration_rows,
        calibration_length=calibration_length,
        seed=seed,
    )
    options = CompressOptions(
        calibration=calibration,
        test_set=test_set,
        tasks=tasks,
        limit=limit,
        limits={name: value for name, value in limits.items() if value is not None},
        device=device,
    )
    if len(ways) > 1:
        _several(model, output, ways, options, beside or [], report, as_json)
    else:
        _one(model, output, ways[0], options, beside or [], report, as_json)


def _one(
    model: Path,
    output: Path,
    way: CompressSettings,
    options: CompressOptions,
    beside: list[Path],
    report: Path | None,
    as_json: bool,
) -> None:
    import lorasmith
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views.compression import show_compressed
    from lorasmith.followup.compression.table import write_page

    record = lorasmith.compress(model, output, settings=way, options=options, progress=bar)
    if report is not None:
        write_page([*beside, output], report)
    if as_json:
        show_record(record)
    else:
        show_compressed(record, console())
        console().print(f"Compressed model: {output}")
    if record.passed is False:
        raise typer.Exit(1)


def _several(
    model: Path,
    output: Path,
    ways: list[CompressSettings],
    options: CompressOptions,
    beside: list[Path],
    report: Path | None,
    as_json: bool,
) -> None:
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views.compression import show_table
    from lorasmith.followup.compression.table import write_page
    from lorasmith.runs.compression import compress_several

    record = compress_several(model, output, ways, options=options, progress=bar)
    if report is not None:
        write_page([*beside, *(output / name for name in record.folders)], report)
    if as_json:
        show_record(record)
    else:
        show_table(record.compressed, record.reason, console())
        console().print(f"Compressed models: {output}")
    if record.recommended is None and any(one.passed is False for one in record.compressed):
        raise typer.Exit(1)
