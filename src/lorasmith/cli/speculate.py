"""`lorasmith speculate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson, Device, Template

if TYPE_CHECKING:
    from rich.console import Console

    from lorasmith.records.followup import SpeculationRecord, SpeculationTiming


def speculate(
    target: Annotated[Path, typer.Option(help="Folder of the model to speed up.", metavar="DIR")],
    prompts: Annotated[Path, typer.Option(help="JSONL with prompts.", metavar="FILE")],
    draft: Annotated[
        Path | None,
        typer.Option(help="Folder of the draft model; without it only prompt lookup.", metavar="DIR"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON to write the record to.", metavar="FILE")] = None,
    draft_tokens: Annotated[str, typer.Option(help="Lengths of a draft, separated by commas.")] = "2,4,6",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    limit: Annotated[int, typer.Option(help="Prompts from the beginning of the file.")] = 20,
    template: Template = "auto",
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Test speculative decoding: same output as greedy, acceptance, speed measured and predicted.

    Exits 1 when a text differs from greedy decoding for another reason than a tie.

    Example: `lorasmith speculate --target merged --draft draft --prompts test.jsonl --output s.json`
    """
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.errors import ExitCode, UsageError
    from lorasmith.followup.speculate import SpeculateOptions
    from lorasmith.followup.speculate import speculate as measure

    try:
        lengths = tuple(int(part) for part in draft_tokens.split(","))
    except ValueError as error:
        raise UsageError(
            f"--draft-tokens is {draft_tokens!r}", expected="numbers separated by commas"
        ) from error
    options = SpeculateOptions(lengths, max_new_tokens, limit, template, device, dtype)
    record, timing = measure(target, prompts, draft=draft, output=output, options=options, progress=bar)
    if as_json:
        show_record(record)
    else:
        show_speculation(record, timing, console())
    if any(setting.different for setting in record.settings):
        raise typer.Exit(ExitCode.ANSWER_IS_NO)


def show_speculation(record: SpeculationRecord, timing: SpeculationTiming | None, console: Console) -> None:
    """Equality and acceptance of each way; its speed and the recommendation where they are given."""
    from lorasmith.cli.console import table
    from lorasmith.cli.views import show_findings

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    speeds = timing.speeds if timing else [None] * len(record.settings)
    rows = []
    for setting, speed in zip(record.settings, speeds, strict=True):
        whole = setting.overall
        row: tuple[str, ...] = (
            f"{setting.method} {setting.draft_tokens}",
            f"{setting.equal}/{setting.ties}/{setting.different}",
            shown(whole.acceptance_rate, ".1%"),
            f"{whole.accepted_length:.2f}",
            " ".join(shown(rate, ".2f") for rate in whole.by_position),
        )
        if speed is not None:
            row += (
                f"{speed.tokens_per_second:.1f}",
                f"{speed.speedup:.2f}",
                shown(speed.predicted, ".2f"),
                shown(speed.predicted_with_verify, ".2f"),
            )
        rows.append(row)
    head: tuple[str, ...] = ("way", "equal/tie/≠", "α", "tokens/pass", "α by place")
    if timing is not None:
        head += ("tok/s", "speed-up", "predicted", "with pass")
    console.print(table("Speculative decoding", head, rows))
    sources = sorted({name for setting in record.settings for name in setting.by_source})
    if len(sources) > 1:
        by_source = [
            (
                f"{setting.method} {setting.draft_tokens}",
                *(shown(setting.by_source[name].acceptance_rate, ".1%") for name in sources),
            )
            for setting in record.settings
        ]
        console.print(table("α by source", ("way", *sources), by_source))
    if timing is not None:
        console.print(f"Greedy decoding: {timing.greedy_tokens_per_second:.1f} tokens/s")
    for difference in record.differences:
        kind = "a tie" if difference.tie else "[red]DIFFERENT[/]"
        console.print(
            f"  {difference.id}, {difference.method} {difference.draft_tokens}: token {difference.place}, "
            f"margin {difference.margin:.2e}, noise {difference.noise:.2e}: {kind}"
        )
    show_findings(record.findings, console)
    if timing is not None:
        console.print(f"Recommendation: {timing.recommendation}", soft_wrap=True)
