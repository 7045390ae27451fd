"""How a comparison of roundings looks in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from lorasmith.records.roundings import RoundingsRecord


def show_roundings(record: RoundingsRecord, screen: Console) -> None:
    """One line per mode, then the recommendation and what speaks against it."""
    table = Table(title="Roundings against the adapter, float32 arithmetic", title_justify="left")
    for name in ("rounding", "loss Δ", "95 % interval", "mean KL", "99.9 % KL", "max KL", "same token"):
        table.add_column(name, justify="left" if name == "rounding" else "right")
    for mode in record.modes:
        interval = mode.loss_delta_interval
        table.add_row(
            mode.name,
            f"{mode.loss_delta:+.1e}",
            "" if interval is None else f"{interval.low:+.1e} … {interval.high:+.1e}",
            f"{mode.kl.mean:.1e}",
            f"{mode.kl.q999:.1e}",
            f"{mode.kl.max:.1e}",
            f"{mode.top1_agreement:.2%}",
        )
        if mode.float16 is not None:
            fits = mode.float16
            share = fits.subnormal / fits.numbers if fits.numbers else 0.0
            table.caption = (
                f"float16: the largest weight is {fits.largest:.3g} of 65,504, {share:.2%} are subnormal"
            )
    screen.print(table)
    screen.print(f"Recommended: {record.reason}", soft_wrap=True, markup=False)
    for finding in record.findings:
        screen.print(f"  {finding.message}", soft_wrap=True, markup=False)
