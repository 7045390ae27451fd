"""How responses, drafts and speculative decoding look on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from lorasmith.records.followup import DraftRecord, RespondRecord, SpeculationRecord, SpeculationTiming


def show_draft(record: DraftRecord, screen: Console) -> None:
    """How it was trained, and what it can do on rows that it has not seen."""
    from lorasmith.cli.console import table
    from lorasmith.cli.views.records import show_findings

    ratio = record.parameters / record.target_parameters
    early = ", stopped early" if record.stopped_early else ""
    screen.print(f"Draft of {record.parameters:,} parameters, {ratio:.1%} of the target's")
    if record.padded_rows:
        screen.print(
            f"  Vocabulary: {record.padded_rows:+d} rows, now {record.vocabulary:,} as in the target"
        )
    screen.print(
        f"  {record.train_rows} rows, {record.steps} steps{early}; the weights are those of step "
        f"{record.best_step}"
    )
    rows = []
    for name, found in (("before training", record.before), ("after", record.generator)):
        kl = "" if found.kl is None else f"{found.kl:.4f}"
        agreement = "" if found.agreement is None else f"{found.agreement:.2%}"
        rows.append((name, f"{found.loss:.4f}", _perplexity(found.perplexity), kl, agreement))
    title = f"Generator on {record.generator.rows} held-out rows ({record.generator.tokens:,} tokens)"
    screen.print(table(title, ("", "loss", "perplexity", "KL", "agreement"), rows))
    if record.classifier is not None:
        _show_classifier(record, screen)
    show_findings(record.findings, screen)


def _perplexity(value: float) -> str:
    """Of layers just cut out it has eight digits, of which none but the first means anything."""
    return f"{value:.3f}" if value < 1e4 else f"{value:.1e}"


def _show_classifier(record: DraftRecord, screen: Console) -> None:
    from lorasmith.cli.console import table

    found = record.classifier
    assert found is not None  # the caller looks
    rows: list[tuple[str, ...]] = [
        ("classifier", f"{found.accuracy:.2%}", f"{found.f1:.3f}", f"{found.calibration_error:.3f}"),
        (
            f"always {found.majority_label!r}",
            f"{found.majority_accuracy:.2%}",
            f"{found.majority_f1:.3f}",
            "–",
        ),
    ]
    origin = "the rows' own labels" if found.labels_from == "data" else "labels by the target's confidence"
    title = f"Classifier on {found.rows} held-out rows ({origin})"
    screen.print(table(title, ("", "accuracy", "F1", "calibration error"), rows))
    rows = [
        (name, *(str(count) for count in counts))
        for name, counts in zip(found.labels, found.confusion, strict=True)
    ]
    screen.print(table("Confusion", ("true, by predicted", *found.labels), rows))


def show_responses(record: RespondRecord, output: Path | None, console: Console) -> None:
    """How the rows ended, how long they are, what to know; where they lie, if it is given."""
    from lorasmith.cli.views.records import show_findings
    from lorasmith.followup.responses.output import Places

    ended = ", ".join(f"{count} {name}" for name, count in record.finish.items())
    console.print(f"Responses: {record.rows} ({ended or 'none'})")
    if record.cut_off:
        console.print(
            f"[yellow]Cut off: {record.cut_off:.1%}[/] at {record.settings.max_new_tokens} tokens or the "
            f"model's context, {record.repeating} of them in a loop"
        )
    if record.lengths:
        sizes = record.lengths
        console.print(
            f"Tokens:    {record.response_tokens:,} generated; a response has {sizes.least} to {sizes.most}, "
            f"median {sizes.median}, 90 % up to {sizes.p90}"
        )
    if record.failed:
        aside = "responses.failed.jsonl of the run" if output is None else Places(output).failed
        console.print(f"[red]Failed: {record.failed}[/]; --retry-failed tries them again")
        console.print(f"  they lie in {aside}", markup=False, soft_wrap=True)
    show_findings(record.findings, console)
    if output is not None:
        console.print(f"Output:    {output}", markup=False, soft_wrap=True)


def show_speculation(record: SpeculationRecord, timing: SpeculationTiming | None, console: Console) -> None:
    """Equality and acceptance of each way; its speed and the recommendation where they are given."""
    from lorasmith.cli.console import table
    from lorasmith.cli.views.records import show_findings

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
