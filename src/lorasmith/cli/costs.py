"""`lorasmith costs`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from lorasmith.records.release import CostRecord, PhaseCost


def costs(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN")],
    price_per_hour: Annotated[
        float | None, typer.Option(help="Price of the machine in dollars an hour. [what each run recorded]")
    ] = None,
    planned: Annotated[
        float | None, typer.Option(help="Cost in dollars that was planned. [as estimated before renting]")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Largest cost in dollars. [what runs or rentals were given]")
    ] = None,
    output_format: Annotated[
        str, typer.Option("--format", help="How costs are printed: text or json.", rich_help_panel="Display")
    ] = "text",
) -> None:
    """What runs cost: per phase and in all, planned against actual, within budget or not.

    Energy and the busy time of GPUs are shown where the devices tell them. A run on a rented machine costs
    what the rental did: all its time, its disk, and traffic. Exit code 1 when it is more than the budget.

    Example: `lorasmith costs run --price-per-hour 1.50 --planned 0.75 --budget 1`
    """
    from lorasmith.cli.console import console, show_record
    from lorasmith.files.costs import costs as add_up

    if output_format not in ("text", "json"):
        raise UsageError(f"there is no format {output_format!r}", expected="text or json")
    record = add_up(runs, price_per_hour=price_per_hour, planned=planned, budget=budget)
    if output_format == "json":
        show_record(record)
    else:
        _show(record, console())
    if record.within_budget is False:
        raise typer.Exit(ExitCode.ANSWER_IS_NO)


def _show(record: CostRecord, screen: Console) -> None:
    from lorasmith.cli.console import table
    from lorasmith.machine.resources import human_bytes

    several = len({phase.run for phase in record.phases}) > 1
    rows = [
        (
            f"{phase.run}: {phase.phase}" if several else phase.phase,
            _time(phase.wall_seconds),
            "" if phase.device_seconds is None else _time(phase.device_seconds),
            _energy(phase.joules) if phase.cpu_seconds is not None else "",
            _memory(phase, human_bytes),
            _money(phase.dollars),
        )
        for phase in record.phases
    ]
    rows.append(
        ("Grand total", _time(record.wall_seconds), "", _energy(record.joules), "", _money(record.dollars))
    )
    columns = ("phase", "wall time", "device time", "energy", "peak memory", "dollars")
    screen.print(table("Cost summary", columns, rows))
    for rental in record.rentals:
        screen.print(
            f"{rental.label}: {rental.hours:.2f} h, machine {_money(rental.compute)}, disk "
            f"{_money(rental.disk)}, traffic {_money(rental.traffic)}: {_money(rental.dollars)}"
        )
    if record.dollars is None:
        screen.print("No price is known: give --price-per-hour for dollars.")
        return
    if record.planned is not None:
        difference = record.dollars - record.planned
        screen.print(
            f"Planned: ${record.planned:.2f}   actual: ${record.dollars:.2f}   difference: ${difference:+.2f}"
        )
    if record.budget is not None:
        word = "Within budget" if record.within_budget else "OVER BUDGET"
        screen.print(f"{word}: ${record.dollars:.2f} of ${record.budget:.2f}")


def _time(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}"


def _energy(joules: float | None) -> str:
    return "not measured" if joules is None else f"{joules / 3600:,.2f} Wh"


def _memory(phase: PhaseCost, human_bytes: Callable[[float], str]) -> str:
    if phase.cpu_seconds is None:  # no stage: time between them, or traffic
        return ""
    main = human_bytes(phase.peak_rss_bytes) if phase.peak_rss_bytes else "not measured"
    others = (("worker", phase.worker_peak_rss_bytes), ("GPU", phase.gpu_peak_bytes))
    return ", ".join([main, *(f"{name} {human_bytes(size)}" for name, size in others if size)])


def _money(dollars: float | None) -> str:
    return "–" if dollars is None else f"${dollars:.4f}" if dollars < 0.1 else f"${dollars:.2f}"
