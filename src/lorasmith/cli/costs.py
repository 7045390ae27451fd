"""`lorasmith costs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from lorasmith.records.costs import CostRecord


def costs(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN")],
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of the machine, in US dollars. [what each run recorded]")
    ] = None,
    planned: Annotated[float | None, typer.Option(help="US dollars that were planned.")] = None,
    budget: Annotated[float | None, typer.Option(help="US dollars that may be spent in all.")] = None,
    output_format: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
) -> None:
    """What runs cost: per phase and in all, planned against actual, within budget or not.

    Exit code 1 when the runs cost more than the budget.

    Example: `lorasmith costs run --price-per-hour 1.50 --planned 0.75 --budget 1`
    """
    from lorasmith.cli.console import console, show_record
    from lorasmith.remote.costs import costs as add_up

    if output_format not in ("text", "json"):
        raise UsageError(f"there is no format {output_format!r}", expected="text or json")
    record = add_up(runs, price_per_hour=price_per_hour, planned=planned, budget=budget)
    if output_format == "json":
        show_record(record)
    else:
        _show(record, console())
    if record.within_budget is False:
        raise typer.Exit(ExitCode.ANSWER_IS_NO)


def _show(record: CostRecord, screen: object) -> None:
    from lorasmith.cli.console import table
    from lorasmith.files.machine import human_bytes

    several = len({phase.run for phase in record.phases}) > 1
    rows = [
        (
            f"{phase.run}: {phase.phase}" if several else phase.phase,
            _time(phase.wall_seconds),
            human_bytes(phase.peak_rss_bytes) if phase.peak_rss_bytes else "not measured",
            _money(phase.dollars),
        )
        for phase in record.phases
    ]
    rows.append(("Grand total", _time(record.wall_seconds), "", _money(record.dollars)))
    show = screen.print  # type: ignore[attr-defined]
    show(table("Cost summary", ("phase", "wall time", "peak memory", "dollars"), rows))
    if record.dollars is None:
        show("No price is known: give --price-per-hour for dollars.")
        return
    if record.planned is not None:
        difference = record.dollars - record.planned
        show(
            f"Planned: ${record.planned:.2f}   actual: ${record.dollars:.2f}   difference: ${difference:+.2f}"
        )
    if record.budget is not None:
        word = "Within budget" if record.within_budget else "OVER BUDGET"
        show(f"{word}: ${record.dollars:.2f} of ${record.budget:.2f}")


def _time(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}"


def _money(dollars: float | None) -> str:
    return "–" if dollars is None else f"${dollars:.4f}" if dollars < 0.1 else f"${dollars:.2f}"
