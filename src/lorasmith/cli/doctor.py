"""`lorasmith doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.flags import Given
from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from rich.console import Console

    from lorasmith.options import RunOptions
    from lorasmith.records.doctor import DoctorRecord


def doctor(
    options: Annotated[dict[str, Any], Given(RunOptions)],
    config: Annotated[
        Path | None, typer.Option(help="TOML file of the run; flags win.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check machine, libraries, model, adapter and test set; estimate time, memory, disk and cost.

    Without options only the machine and the libraries are looked at. Exit code 1 when a run would fail here.

    Example: `lorasmith doctor --base base --adapter adapter --test-set test.jsonl --price-per-hour 1.5`
    """
    from lorasmith.cli.console import console, show_record
    from lorasmith.errors import ExitCode
    from lorasmith.preflight.doctor import examine
    from lorasmith.runs.config import load_config

    inputs = ("base", "adapter", "test_set")
    asked = config is not None or any(name in options for name in inputs)
    if asked and config is None:
        options.setdefault("output", Path("run"))
    record = examine(load_config(config, options) if asked else None)
    if as_json:
        show_record(record)
    else:
        _show(record, console())
    if any(check.state == "error" for check in record.checks):
        raise typer.Exit(ExitCode.ANSWER_IS_NO)


doctor.works_without_arguments = True  # type: ignore[attr-defined]

_MARKS = {"ok": "[green]✓[/]", "note": "[blue]·[/]", "warning": "[yellow]![/]", "error": "[red]✗[/]"}


def _show(record: DoctorRecord, screen: Console) -> None:
    from rich.markup import escape

    from lorasmith.cli.console import table
    from lorasmith.machine.resources import human_bytes

    for check in record.checks:
        screen.print(f"{_MARKS[check.state]} {check.name}: {escape(check.found)}", soft_wrap=True)
        if check.remedy:
            screen.print(f"    {check.remedy}", markup=False, soft_wrap=True)
    if not record.stages:
        return
    rows = [
        (stage.stage, _time(stage.seconds), human_bytes(stage.memory_bytes), human_bytes(stage.disk_bytes))
        for stage in record.stages
    ]
    total = (
        _time(record.seconds or 0),
        human_bytes(record.memory_bytes or 0),
        human_bytes(record.disk_bytes or 0),
    )
    rows.append(("all", *total))
    screen.print(table("What a run would take, about", ("step", "time", "peak memory", "disk"), rows))
    rates = record.rates
    screen.print(
        f"Measured here: {rates['flops'] / 1e9:,.0f} GFLOP/s in float32, "
        f"{human_bytes(rates['write_bytes'])}/s to disk, {human_bytes(rates['read_bytes'])}/s from memory, "
        f"{human_bytes(rates['round_bytes'])}/s rounded, {human_bytes(rates['pack_bytes'])}/s packed"
    )
    if record.dollars is not None:
        screen.print(f"Cost: about ${record.dollars:.2f} at ${record.price_per_hour:g} an hour")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
