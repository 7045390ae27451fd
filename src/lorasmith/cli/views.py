"""How each record looks in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.cli.console import table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from lorasmith.records.base import Finding
    from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics
    from lorasmith.records.merging import MergeRecord
    from lorasmith.records.proof import (
        BehaviourProof,
        ComparisonRecord,
        PairedEffect,
        TensorProof,
        WeightProof,
    )
    from lorasmith.records.release import GateRecord, PackageManifest, StageTiming
    from lorasmith.records.scoring import GroupMetrics, TaskResult, ValidationResult
    from lorasmith.records.training import TrainRecord

_MARK = {
    "pass": "[green]✓ pass[/]",
    "fail": "[red]✗ fail[/]",
    "not measured": "[yellow]– not measured[/]",
}
_ROLE = {"base": "Base Model", "adapter": "LoRA Model", "merged": "Merged Model"}


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """Each finding on a line of its own, with its place and what to do."""
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for finding in findings:
        colour = colours.get(finding.severity, "white")
        console.print(f"  [{colour}]{finding.severity}[/] {finding.message}", soft_wrap=True)
        for label, text in (("where", finding.where), ("to do", finding.remedy)):
            if text:
                console.print(f"    {label}: {text}", markup=False, soft_wrap=True)


def show_statistics(record: DatasetStatistics, console: Console) -> None:
    """Counts by source, domain and difficulty."""
    rows = [
        (f"{kind} {name}", str(count))
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
    reason = f": {record.reason}" if record.reason else ""
    console.print(
        f"Independence from the training data: [{colour}]{record.verdict}[/]{reason}", soft_wrap=True
    )
    rows = [(hit.kind, hit.test_id, hit.train_id, f"{hit.score:.2f}") for hit in record.hits[:10]]
    if rows:
        console.print(table("First overlaps", ("kind", "test row", "training row", "score"), rows))


def show_validation(result: ValidationResult, console: Console) -> None:
    """Loss, perplexity and counts, as a whole and by group."""
    whole = result.overall
    console.print(f"{_ROLE.get(result.model.role, result.model.role)} Results:")
    console.print(f"  Loss: {whole.loss:.6f}{_interval(whole)}")
    console.print(f"  Perplexity: {whole.perplexity:.4f}")
    sources = result.groups.get("source", {})
    cut = f", {result.truncated} cut at {result.settings.max_length} tokens" if result.truncated else ""
    part = " (a part of the test set)" if result.partial else ""
    plural = "s" if len(sources) != 1 else ""
    console.print(
        f"  Examples: {whole.examples} ({len(sources)} source{plural}), {whole.tokens:,} tokens{cut}{part}"
    )
    rows = [
        (f"{kind} {name}", str(found.examples), f"{found.loss:.4f}", f"{found.perplexity:.3f}")
        for kind in ("source", "domain", "difficulty")
        for name, found in result.groups.get(kind, {}).items()
        if len(result.groups[kind]) > 1
    ]
    if rows:
        console.print(table("By group", ("group", "examples", "loss", "perplexity"), rows))
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
    console.print(table("The benchmarks' own metrics", columns, rows))
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


def show_merge(record: MergeRecord, console: Console) -> None:
    """What the merge changed, and how much of the update rounding swallowed."""
    console.print(
        f"{len(record.tensors)} tensors merged, {record.copied} copied byte for byte, {record.cast} cast"
    )
    share = record.swallowed_fraction
    console.print(
        f"  Rounding ({record.rounding}, precision {record.precision}) swallowed the update of {share:.1%}"
        f" of {record.elements_updated:,} elements"
    )
    redone = sum(tensor.exact_redone for tensor in record.tensors)
    console.print(f"  {redone:,} elements were decided by exact arithmetic")
    show_findings(record.findings, console)


def show_weights(proof: WeightProof, console: Console) -> None:
    """The grade of the weights, and the first differences."""
    colour = "red" if proof.grade == "different" else "green"
    bound = f" (within {proof.bound_ulps} ulps)" if proof.grade == "bounded" else ""
    console.print(
        f"Weights: [{colour}]{proof.grade}[/]{bound}: {proof.elements_checked:,} elements of"
        f" {proof.tensors_checked} tensors checked against their own recomputation,"
        f" {proof.adapter_tensors_used} of {proof.adapter_tensors_total} adapter tensors used",
        soft_wrap=True,
    )
    # In a bounded merge elements are meant to be off by a few ulps; the record lists them.
    shown = proof.grade == "different"
    wrong = [tensor for tensor in proof.tensors if tensor.wrong]
    if wrong and shown:
        console.print(table("Wrong tensors", _WRONG_COLUMNS, [_wrong_row(tensor) for tensor in wrong[:20]]))
    if proof.differences and shown:
        rows = [
            (found.tensor, str(found.index), str(found.found), str(found.expected), str(found.ulps))
            for found in proof.differences[:10]
        ]
        columns = ("tensor", "index", "found", "expected", "ulps")
        console.print(table("First differences", columns, rows))
    show_findings(proof.findings, console)


_WRONG_COLUMNS = ("tensor", "kind", "elements", "wrong", "largest distance in ulps")


def _wrong_row(tensor: TensorProof) -> tuple[str, ...]:
    return (tensor.name, tensor.kind, f"{tensor.elements:,}", f"{tensor.wrong:,}", f"{tensor.max_ulps:,}")


def show_behaviour(proof: BehaviourProof, console: Console) -> None:
    """The grade of the behaviour and the numbers that decided it, beside the noise floor."""
    colour = {"drifted": "red", "not measured": "yellow"}.get(proof.grade, "green")
    console.print(f"Behaviour: [{colour}]{proof.grade}[/] on {proof.overall.tokens:,} tokens")
    for reason in proof.reasons:
        console.print(f"  {reason}", markup=False, soft_wrap=True)
    found, floor, serving = proof.overall, proof.floor, proof.serving
    against = [(found, "measured"), (floor, "noise floor")]
    if serving:
        against.append((serving, f"adapter in {proof.serving_layouts[-1].split(', ')[-1]}"))
    rows = [
        (name, *(show(other) if other else "not measured" for other, _ in against))
        for name, show in _COMPARED
    ]
    columns = ("adapter against merged", *(title for _, title in against))
    console.print(table("Token by token", columns, rows))
    if proof.generation:
        wrote = proof.generation
        console.print(
            f"Greedy answers up to {wrote.max_new_tokens} tokens: {wrote.same} of {wrote.examples} alike,"
            f" {wrote.tokens_before_divergence:.1f} tokens before the first difference on average"
        )
    show_findings(proof.findings, console)


_COMPARED: tuple[tuple[str, Callable[..., str]], ...] = (
    ("loss Δ", lambda found: f"{found.loss_delta:+.2e}"),
    ("perplexity Δ", lambda found: f"{found.perplexity_delta:+.2e}"),
    ("mean KL", lambda found: f"{found.kl.mean:.2e} ± {found.kl.standard_error:.0e}"),
    ("99.9 % KL", lambda found: f"{found.kl.q999:.2e}"),
    ("largest KL", lambda found: f"{found.kl.max:.2e}"),
    ("top-1 agreement", lambda found: f"{found.top1_agreement:.2%}"),
)


def show_comparison(record: ComparisonRecord, console: Console) -> None:
    """What the adapter does to the base, and what the merge does to the adapter."""
    effects = [("merged against adapter", record.merge_effect)]
    if record.adapter_effect:
        effects.insert(0, ("adapter against base", record.adapter_effect))
    rows = [(name, f"{effect.loss_delta:+.6f}", _span(effect), effect.verdict) for name, effect in effects]
    console.print(table("Effects on the loss", ("", "Δ", "95 % interval", "verdict"), rows))


def _span(effect: PairedEffect) -> str:
    found = effect.interval
    return f"{found.low:+.6f} to {found.high:+.6f}" if found else "not measured"


def show_gates(record: GateRecord, console: Console) -> None:
    """Each gate with what was measured, and the advice for those that failed."""
    from lorasmith.gates.formats import advice, found, show

    rows = [
        (
            result.gate.name,
            found(result),
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
    from lorasmith.files.machine import human_bytes

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
    from lorasmith.files.machine import human_bytes

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
