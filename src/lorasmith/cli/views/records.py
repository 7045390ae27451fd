"""How records look in the terminal: data, scores, gates, package (merge and proofs: proof_views.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from lorasmith.cli.console import plain, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from lorasmith.records.base import Finding
    from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics
    from lorasmith.records.followup import TrainRecord
    from lorasmith.records.merging import RoundingsRecord
    from lorasmith.records.release import GateRecord, PackageManifest, StageTiming
    from lorasmith.records.scoring import GroupMetrics, TaskResult, ValidationResult


_MARK = {
    "pass": "[green]✓ pass[/]",
    "fail": "[red]✗ fail[/]",
    "not measured": "[yellow]– not measured[/]",
}
PARTIAL = "a part of the test set"
"""Stands wherever figures are those of a quick look (`--limit`)."""
_ROLE = {"base": "Base Model", "adapter": "LoRA Model", "merged": "Merged Model"}


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """Each finding on a line of its own, with its place and what to do."""
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for finding in findings:
        colour = colours.get(finding.severity, "white")
        console.print(f"  [{colour}]{finding.severity}[/] {plain(finding.message)}", soft_wrap=True)
        for label, text in (("where", finding.where), ("to do", finding.remedy)):
            if text:
                console.print(f"    {label}: {plain(text)}", soft_wrap=True)


def show_statistics(record: DatasetStatistics, console: Console) -> None:
    """Counts by source, domain and difficulty."""
    rows = [
        (plain(f"{kind} {name}"), str(count))
        for kind, counts in (
            ("source", record.by_source),
            ("domain", record.by_domain),
            ("difficulty", record.by_difficulty),
        )
        for name, count in sorted(counts.items())
    ]
    console.print(table(f"{record.examples} examples", ("group", "examples"), rows))
    show_findings(record.findings, console)


def show_contamination(record: ContaminationRecord, console: Console) -> None:
    """Whether the test set is independent of the training data, and the first rows that are not."""
    colour = {"independent": "green", "contaminated": "red"}.get(record.verdict, "yellow")
    reason = f": {plain(record.reason)}" if record.reason else ""
    console.print(
        f"Independence from the training data: [{colour}]{record.verdict}[/]{reason}", soft_wrap=True
    )
    counted = [hit for hit in record.hits if record.is_verdict(hit)]
    rows = [(hit.kind, plain(hit.test_id), plain(hit.train_id), f"{hit.score:.2f}") for hit in counted[:10]]
    if rows:
        console.print(table("First overlaps", ("kind", "test row", "training row", "score"), rows))
    few = {hit.test_id for hit in record.hits} - {hit.test_id for hit in counted}
    if few:
        share = record.parameters["share"]
        console.print(f"Test rows that share runs of words, but less than {share:g} of theirs: {len(few)}")


def show_validation(result: ValidationResult, console: Console) -> None:
    """Loss, perplexity and counts, as a whole and by group."""
    whole = result.overall
    console.print(f"{_ROLE.get(result.model.role, result.model.role)} Results:")
    console.print(f"  Loss: {whole.loss:.6f}{_interval(whole)}")
    console.print(f"  Perplexity: {whole.perplexity:.4f}")
    sources = result.groups.get("source", {})
    cut = f", {result.truncated} cut at {result.settings.max_length} tokens" if result.truncated else ""
    part = f" ({PARTIAL})" if result.partial else ""
    plural = "s" if len(sources) != 1 else ""
    console.print(
        f"  Examples: {whole.examples} ({len(sources)} source{plural}), {whole.tokens:,} tokens{cut}{part}"
    )
    rows = [
        (
            plain(f"{kind} {name}"),
            str(found.examples),
            f"{found.tokens:,}",
            f"{found.loss:.4f}",
            f"{found.interval.low:.4f} to {found.interval.high:.4f}" if found.interval else "not measured",
            f"{found.perplexity:.3f}",
        )
        for kind in ("source", "domain", "difficulty", "turn")
        for name, found in result.groups.get(kind, {}).items()
        if len(result.groups[kind]) > 1
    ]
    if rows:
        columns = ("group", "examples", "tokens", "loss", "95 % interval", "perplexity")
        console.print(table("By group", columns, rows))
    show_findings(result.findings, console)


def _interval(metrics: GroupMetrics) -> str:
    found = metrics.interval
    return f"  ({found.level:.0%} interval {found.low:.4f} to {found.high:.4f})" if found else ""


def show_tasks(result: TaskResult, console: Console) -> None:
    """Each benchmark's own metric, with what could not be scored and what the token limit cut off."""
    rows = [
        (
            f"{metric.benchmark} {metric.metric}",
            metric.method,
            "not measured" if metric.value is None else f"{metric.value:.2%}",
            f"{metric.interval.low:.1%} to {metric.interval.high:.1%}" if metric.interval else "",
            f"{metric.scored} of {metric.examples}",
            str(metric.hit_limit) if metric.method == "generation" else "",
        )
        for metric in result.metrics
    ]
    columns = ("metric", "by", "value", "95 % interval", "scored", "cut off")
    part = f" ({PARTIAL})" if result.partial else ""
    role = _ROLE.get(result.model.role, result.model.role)
    console.print(table(f"{role}, the benchmarks' own metrics{part}", columns, rows))
    show_findings(result.findings, console)


def show_training(record: TrainRecord, console: Console) -> None:
    """What was trained, and the loss at both ends."""
    tenth = max(1, len(record.losses) // 10)
    first, last = record.losses[:tenth], record.losses[-tenth:]
    console.print(
        f"{record.examples} examples, {record.tokens:,} response tokens, {len(record.losses)} steps,"
        f" {record.trainable_parameters:,} trainable parameters"
    )
    console.print(
        f"  Training loss: {sum(first) / tenth:.4f} in the first {tenth} steps,"
        f" {sum(last) / tenth:.4f} in the last {tenth}"
    )
    if record.truncated:
        console.print(f"  {record.truncated} rows were cut at {record.settings['max_length']} tokens")


def show_gates(record: GateRecord, console: Console) -> None:
    """Each gate with what was measured, and the advice for those that failed."""
    from lorasmith.gates.formats import advice, measured, show

    rows = [
        (
            plain(result.gate.name),
            measured(result),
            f"{result.gate.comparison} {show(result.gate.threshold)}",
            _MARK[result.verdict],
        )
        for result in record.gates
    ]
    console.print(table("Gates", ("gate", "measured", "wanted", "verdict"), rows))
    for result in record.gates:
        if result.verdict != "pass":
            console.print(f"  {result.gate.name}: {advice(result)}", markup=False, soft_wrap=True)


def show_package(record: PackageManifest, console: Console) -> None:
    """The archives, their sizes and hashes."""
    from lorasmith.machine.resources import human_bytes

    rows = [
        (
            archive.path,
            str(len(record.contents[archive.path])),
            human_bytes(archive.bytes),
            archive.sha256[:16],
        )
        for archive in record.archives
    ]
    console.print(table("Package", ("archive", "files", "size", "SHA-256"), rows))


def show_timings(timings: Sequence[StageTiming], console: Console) -> None:
    """Wall time, processor time and peak memory of each stage."""
    from lorasmith.machine.resources import human_bytes

    rows = [
        (
            timing.stage + (" (reused)" if timing.reused else ""),
            f"{timing.wall_seconds:.1f} s",
            f"{timing.cpu_seconds:.1f} s",
            human_bytes(timing.peak_rss_bytes) if timing.peak_rss_bytes else "not measured",
        )
        for timing in timings
    ]
    total = sum(timing.wall_seconds for timing in timings)
    rows.append(("all", f"{total:.1f} s", f"{sum(t.cpu_seconds for t in timings):.1f} s", ""))
    console.print(table("Time and memory", ("step", "wall", "processor", "peak memory"), rows))


# How a comparison of roundings looks in the terminal.


def show_roundings(record: RoundingsRecord, screen: Console) -> None:
    """One line per mode, then the recommendation and what speaks against it."""
    table = Table(title="Roundings against the adapter, float32 arithmetic", title_justify="left")
    names = ["rounding", "loss Δ", "95 % interval", "mean KL", "99.9 % KL", "max KL", "same token"]
    kept = any(mode.recovery is not None for mode in record.modes)
    for name in [*names, "gain kept"] if kept else names:
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
            *([] if mode.recovery is None else [f"{mode.recovery:.1%}"]),
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
