"""How plans and compressed models look in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasmith.cli.console import table
from lorasmith.cli.views.records import show_findings
from lorasmith.machine.resources import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from lorasmith.records.compression import CompressRecord, SizePlan
    from lorasmith.records.scoring import TaskEffect


def show_plan(sizes: SizePlan, screen: Console) -> None:
    """The table of methods, and what they mean for the target."""
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


def show_compressed(record: CompressRecord, screen: Console) -> None:
    """Size, what was lost, and the gates."""
    screen.print(
        f"{record.kind}, {record.method}: {human_bytes(record.original_bytes)} → "
        f"{human_bytes(record.bytes)} ({record.bits_per_weight:.2f} bits per weight)",
        soft_wrap=True,
    )
    if record.quality is None:
        screen.print("Quality: not measured (give --test-set)")
        show_findings(record.findings, screen)
        return
    found = record.quality
    screen.print(f"  Perplexity:      {found.perplexity_a:.4f} → {found.perplexity_b:.4f}")
    screen.print(f"  Ratio:           {found.perplexity_ratio:.4f}")
    screen.print(f"  KL, mean / 99 %: {found.kl.mean:.4f} / {found.kl.q99:.4f} nats")
    screen.print(f"  Top-1 agreement: {found.top1_agreement:.2%}  ({found.tokens:,} tokens)")
    if record.tasks is not None:
        rows = [_task_row(effect, name) for name, effect in record.tasks.named]
        columns = ("questions", "number", "original", "compressed", "Δ", "95 % interval")
        screen.print(table("Task accuracy", columns, rows))
    for gate in record.gates:
        mark = "[green]✓ pass[/]" if gate.verdict == "pass" else f"[red]✗ {gate.verdict}[/]"
        bound = f"{gate.gate.comparison} {gate.gate.threshold:g}"
        value = gate.reason if gate.measured is None else f"{gate.measured:.4f}"
        if gate.gate.metric == "compressed.bytes":
            bound, value = f"<= {human_bytes(int(gate.gate.threshold))}", human_bytes(record.bytes)
        screen.print(f"  {mark} {gate.gate.name}: {value} ({bound})", soft_wrap=True)
    show_findings(record.findings, screen)


def show_table(found: Sequence[CompressRecord], reason: str, screen: Console) -> None:
    """One line for each way, from the smallest to the largest, and which to take."""
    from lorasmith.followup.compression.table import COLUMNS, cells

    rows = [cells(one) for one in sorted(found, key=lambda one: one.bytes)]
    screen.print(table("Compressed models against the original", COLUMNS, rows))
    screen.print(f"Recommended: {reason}", soft_wrap=True, markup=False)


def _task_row(effect: TaskEffect, name: str) -> tuple[str, ...]:
    spread = effect.interval
    return (
        name,
        str(effect.examples),
        f"{effect.value_a:.2%}",
        f"{effect.value_b:.2%}",
        f"{effect.delta:+.2%}",
        "" if spread is None else f"{spread.low:+.2%} … {spread.high:+.2%}",
    )
