"""`lorasmith compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson, Device, Limit

if TYPE_CHECKING:
    from lorasmith.records.compression import CompressRecord, SizePlan

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
        str | None, typer.Option(help="Wanted size, such as 540MB or 4GB; refused where nothing reaches it.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="rtn (round to nearest), or calibrated (on rows of --calibration).")
    ] = "rtn",
    form: Annotated[
        str,
        typer.Option(
            "--format", help="compressed-tensors, gguf:q4_0, gguf:q4_k_m, gguf:q5_k_m, gguf:q8_0, …"
        ),
    ] = "compressed-tensors",
    bits: Annotated[int | None, typer.Option(help="Bits of a weight. [4, or the format's own]")] = None,
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
    min_top1: Annotated[float, typer.Option(help="Gate on the quality, 0..1.")] = 0.9,
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
    and a target that nothing reaches ends with 1. Needs the extra `compress` (auto-round).

    Example: `lorasmith compress --model models/merged --plan --target-size 540MB`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.errors import UsageError
    from lorasmith.followup.sizes_plan import plan_compression

    if plan or target_size is not None:
        sizes = plan_compression(model, target_size=target_size)
        if plan and as_json:
            show_record(sizes)
        elif plan or sizes.reachable is False:
            _show_plan(sizes)
        if sizes.reachable is False:
            raise typer.Exit(1)
        if plan:
            return
    if output is None:
        raise UsageError("there is no place to write to", remedy="give --output DIR, or --plan")
    from lorasmith.followup.compress import compress as run
    from lorasmith.followup.compress_settings import CompressSettings
    from lorasmith.followup.compress_table import write_page
    from lorasmith.proving.behaviour_pair import compare_pair

    settings = CompressSettings(
        method=method,
        format=form,
        bits=bits or CompressSettings.own_bits(form),
        group_size=group_size,
        iterations=iterations,
        calibration_rows=calibration_rows,
        calibration_length=calibration_length,
        seed=seed,
    )
    record = run(
        model,
        output,
        settings=settings,
        calibration=calibration,
        test_set=test_set,
        compare=compare_pair,
        limit=limit,
        limits={
            "perplexity_ratio": max_perplexity_ratio,
            "mean_kl": max_mean_kl,
            "top1_agreement": min_top1,
        },
        device=device,
        progress=bar,
    )
    if report is not None:
        write_page([*(beside or []), output], report)
    if as_json:
        show_record(record)
    else:
        _show(record)
        console().print(f"Compressed model: {output}")
    if record.passed is False:
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


def _show(record: CompressRecord) -> None:
    """Size, and what was lost."""
    from lorasmith.cli.console import console
    from lorasmith.files.machine import human_bytes

    screen = console()
    screen.print(
        f"{record.file_format}, {record.method}: {human_bytes(record.original_bytes)} → "
        f"{human_bytes(record.bytes)} ({record.bits_per_weight:.2f} bits per weight)",
        soft_wrap=True,
    )
    if record.quality is None:
        screen.print("Quality: not measured (give --test-set)")
        return
    found = record.quality
    screen.print(f"  Perplexity:      {found.perplexity_a:.4f} → {found.perplexity_b:.4f}")
    screen.print(f"  Ratio:           {found.perplexity_ratio:.4f}")
    screen.print(f"  KL, mean / 99 %: {found.kl.mean:.4f} / {found.kl.q99:.4f} nats")
    screen.print(f"  Top-1 agreement: {found.top1_agreement:.2%}  ({found.tokens:,} tokens)")
    for gate in record.gates:
        mark = "[green]✓ pass[/]" if gate.verdict == "pass" else "[red]✗ fail[/]"
        bound = f"{gate.gate.comparison} {gate.gate.threshold:g}"
        screen.print(f"  {mark} {gate.gate.name}: {gate.measured:.4f} ({bound})", soft_wrap=True)
