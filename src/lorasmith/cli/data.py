"""`lorasmith data show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from lorasmith.options import ShowOptions
    from lorasmith.records.dataset import DataRecord, ShownRow

OPEN, CLOSE = "\u27e6", "\u27e7"
"""Around what is scored; where a row holds these signs itself, they are spelled out."""
LONGEST = 1_200
"""Characters of a piece that are shown without --full: half from its start, half from its end."""


def show(
    data: Annotated[
        Path,
        typer.Argument(help="File, folder, or org/name[:split] on the Hugging Face hub.", metavar="FILE"),
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder or name of a model: rows are shown as it sees them.", metavar="MODEL"),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter that brings a tokenizer.", metavar="DIR")
    ] = None,
    *,
    options: ShowOptions,
    as_json: AsJson = False,
) -> None:
    """Layout, turns and lengths of rows, and some of them as the model sees them, the scored tokens marked.

    Exit code 1 when there are rows that cannot be used, unless --skip-bad-rows is given.

    Example: `lorasmith data show train.jsonl --model models/base --loss-on assistant`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.testset.show import show as show_rows

    record = show_rows(data, model=model, adapter=adapter, options=options, progress=bar)
    if as_json:
        show_record(record)
    else:
        show_data(record, console(), full=options.full)
    if record.unusable and not options.skip_bad_rows:
        raise typer.Exit(1)


def show_data(record: DataRecord, screen: Console, *, full: bool) -> None:
    """The counts, what cannot be used, then the rows."""
    from lorasmith.cli.views.records import show_findings

    layouts = ", ".join(f"{name} ({count:,})" for name, count in record.layouts.items()) or "none"
    screen.print(f"Layout:  {layouts}", markup=False)
    unusable = f", and {record.unusable:,} that cannot be used" if record.unusable else ""
    screen.print(f"Rows:    {record.rows:,}{unusable}, {record.characters:,} characters")
    answers = [f"{_turns(count)}: {rows:,}" for count, rows in list(record.answers.items())[:8]]
    more = " …" if len(record.answers) > 8 else ""
    extras = f"; {record.system_prompts:,} with a system prompt, {record.tools:,} with tools"
    screen.print(f"Answers: {', '.join(answers)}{more}{extras}")
    if record.tokens is not None:
        found = record.tokens
        screen.print(
            f"Tokens:  {found.total:,}, of which {found.scored:,} are scored (--loss-on {found.loss_on}, "
            f"--boundary {found.boundary}, template {found.template}, tokenizer of {found.tokenizer})",
            markup=False,
        )
        screen.print(
            f"         a row: {found.shortest:,} to {found.longest:,}, median {found.median:,}, "
            f"95 % up to {found.most_are_below:,}"
        )
        if found.straddling:
            screen.print(f"         in {found.straddling:,} rows prompt and answer share a token")
        if found.too_long is not None:
            screen.print(f"         {found.too_long:,} rows are too long")
    for place, reason in record.faults:
        screen.print(f"  cannot be used: {place}: {reason}", markup=False)
    if record.unusable > len(record.faults):
        screen.print(f"  … and {record.unusable - len(record.faults):,} more")
    show_findings(record.findings, screen)
    if record.shown and record.tokens is not None:
        screen.print(f"\nWhat stands in {OPEN}…{CLOSE} is scored.")
    for row in record.shown:
        show_row(row, screen, full=full)


def _turns(count: str) -> str:
    return {"0": "raw text", "1": "one"}.get(count, count)


def show_row(row: ShownRow, screen: Console, *, full: bool) -> None:
    """One row under a heading."""
    counted = "" if row.tokens is None else f", {row.tokens:,} tokens, {row.scored:,} scored"
    roles = ", ".join(row.turns[:12]) + (" …" if len(row.turns) > 12 else "")
    screen.rule(f"{row.place} ({row.id}): {roles}{counted}", align="left")
    screen.print(row_text(row, full=full), soft_wrap=True)


def row_text(row: ShownRow, *, full: bool) -> Text:
    """The pieces one after the other, those that are scored between signs and in another colour."""
    from rich.text import Text

    text = Text()
    for piece, scored in row.pieces:
        shown = piece.replace(OPEN, "\\u27e6").replace(CLOSE, "\\u27e7")
        if len(shown) > LONGEST and not full:
            half = LONGEST // 2
            shown = f"{shown[:half]} … {len(shown) - LONGEST:,} characters … {shown[-half:]}"
        text.append(f"{OPEN}{shown}{CLOSE}" if scored else shown, style="green" if scored else "")
    return text
