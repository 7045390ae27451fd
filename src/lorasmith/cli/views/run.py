"""How a whole run looks in the terminal: headings, what each step found, the summary at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasmith.cli.console import bar, console
from lorasmith.cli.views import proofs, records
from lorasmith.cli.views.followup import show_draft, show_responses, show_speculation
from lorasmith.gates.formats import count_of
from lorasmith.machine.resources import human_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from lorasmith.files.run_layout import FollowupRecords
    from lorasmith.progress import Progress
    from lorasmith.records.compression import CompressRecord
    from lorasmith.records.scoring import ValidationResult
    from lorasmith.runs.results import RunResult

_LINE = "━" * 60


class TerminalWatcher:
    """Follows a run on standard output; bars go to standard error."""

    progress: Progress = staticmethod(bar)

    def __init__(self, screen: Console | None = None) -> None:
        self.screen = screen or console()

    def step(self, number: int, total: int, title: str) -> None:
        """The heading of a step."""
        self.screen.print(f"\n{_LINE}\nStep {number}/{total}: {title}\n{_LINE}", markup=False)

    def finished(self, stage: str, *, reused: bool, seconds: float) -> None:
        """Whether the step ran, and how long it took."""
        how = "unchanged, kept from before" if reused else f"done in {seconds:.1f} s"
        self.screen.print(f"[green]✓[/] {stage}: {how}")

    def show(self, stage: str, record: Any) -> None:
        """What the step found."""
        _VIEWS[type(record).__name__](record, self.screen)

    def generated(self, tokens: int) -> None:
        """A run shows rows."""


_VIEWS: dict[str, Any] = {
    "DatasetStatistics": records.show_statistics,
    "ContaminationRecord": records.show_contamination,
    "TrainRecord": records.show_training,
    "ValidationResult": records.show_validation,
    "TaskResult": records.show_tasks,
    "MergeRecord": proofs.show_merge,
    "WeightProof": proofs.show_weights,
    "BehaviourProof": proofs.show_behaviour,
    "ComparisonRecord": proofs.show_comparison,
    "GateRecord": records.show_gates,
    "PackageManifest": records.show_package,
    "Finding": lambda finding, screen: records.show_findings([finding], screen),
    "RespondRecord": lambda record, screen: show_responses(record, None, screen),
    "DraftRecord": show_draft,
    "SpeculationRecord": lambda record, screen: show_speculation(record, None, screen),
    "CompressRecord": lambda record, screen: screen.print(_compressed(record), soft_wrap=True),
}


def show_summary(result: RunResult, screen: Console) -> None:
    """The guide's summary: three models, their differences, the verdict, where everything lies."""
    screen.print(f"\nVALIDATION RESULTS SUMMARY\n{'=' * 60}\n")
    for title, found in (
        ("Base Model", result.base),
        ("LoRA Model", result.adapter),
        ("Merged Model", result.merged),
    ):
        _show_model(title, found, screen)
    overall = result.behaviour.overall
    screen.print("Comparison (LoRA against merged, token by token in float32 arithmetic):")
    screen.print(f"  Loss Δ:     {overall.loss_delta:+.8f}")
    screen.print(f"  PPL Δ:      {overall.perplexity_delta:+.6f}")
    screen.print(f"  Mean KL:    {overall.kl.mean:.2e}")
    screen.print(f"  Top-1:      {overall.top1_agreement:.2%}\n")
    _show_verdict(result, screen)
    if result.followup is not None:
        _show_followup(result.followup, screen)
    _show_places(result.folder, screen)


def _show_model(title: str, found: ValidationResult, screen: Console) -> None:
    screen.print(f"{title}:")
    screen.print(f"  Loss:       {found.overall.loss:.6f}")
    screen.print(f"  Perplexity: {found.overall.perplexity:.4f}")
    screen.print(f"  Examples:   {found.overall.examples}\n")


def _show_verdict(result: RunResult, screen: Console) -> None:
    effect = result.comparison.adapter_effect
    helped = effect.verdict if effect else "not measured"
    screen.print(f"Adapter:   {helped} on this test set ({_contamination(result)})")
    screen.print(f"Weights:   {_weights_claim(result)}")
    screen.print(f"Behaviour: {result.behaviour.grade}")
    records.show_findings(result.merge.base_warnings, screen)
    failed = [gate for gate in result.judged.gates if gate.verdict != "pass"]
    verdict = count_of(result.judged)
    if not failed:
        screen.print(f"\n{'=' * 60}\n[green]✓[/] {verdict}.")
        return
    names = ", ".join(f"{gate.gate.name} ({gate.verdict})" for gate in failed)
    screen.print(f"\n{'=' * 60}\n[red]✗[/] {verdict}: {names}", soft_wrap=True)


_RULES = {"nearest": "correctly rounded", "dithered": "dithered by its own threshold"}


def _weights_claim(result: RunResult) -> str:
    """What the proof of the weights lets us say, in words that claim no more."""
    proof = result.weights
    claims = {
        "exact": f"exact: every element is W + s·B·A, {_RULES.get(proof.rounding, proof.rounding)}",
        "bounded": f"bounded: every element within {proof.bound_ulps} ulps of the exact merge",
        "different": "DIFFERENT: the merged model is not this merge",
    }
    return claims[proof.grade]


def _show_followup(found: FollowupRecords, screen: Console) -> None:
    """One line for each step after the release, and a table of several compressed models."""
    screen.print("\nAfter the release:")
    if found.responses is not None:
        rows = found.responses
        screen.print(f"  Responses:   {rows.rows}, {rows.cut_off:.1%} cut off, {rows.failed} failed")
    if found.draft is not None:
        agreement = found.draft.generator.agreement
        same = "" if agreement is None else f", the target's likeliest token {agreement:.1%} of the time"
        screen.print(f"  Draft model: {found.draft.parameters:,} parameters{same}", soft_wrap=True)
    if found.speculation_speed is not None:
        screen.print(f"  Speculation: {found.speculation_speed.recommendation}", soft_wrap=True)
    if len(found.compressed) == 1:
        screen.print(_compressed(found.compressed[0]), soft_wrap=True)
    elif found.compressed:
        from lorasmith.cli.views.compression import show_table
        from lorasmith.followup.compression.table import recommend

        names = [f"{record.kind} ({record.method})" for record in found.compressed]
        show_table(found.compressed, recommend(names, found.compressed)[1], screen)


def _compressed(record: CompressRecord) -> str:
    """Size and quality in a line; the gates stand in the report."""
    quality = record.quality
    lost = ""
    if quality is not None:
        lost = f", perplexity × {quality.perplexity_ratio:.4f}, mean KL {quality.kl.mean:.4f}"
        lost += f", top-1 {quality.top1_agreement:.2%}"
    failed = [result.gate.name for result in record.gates if result.verdict != "pass"]
    verdict = {True: ", gates pass", False: f", [red]✗[/] {', '.join(failed)}", None: ""}[record.passed]
    return (
        f"  {record.kind}, {record.method}: {human_bytes(record.bytes)}, {record.bits_per_weight:.2f} bits a "
        f"weight"
        f"{lost}{verdict}"
    )


def _contamination(result: RunResult) -> str:
    found = result.contamination
    return f"independence: {found.verdict}" + (f", {found.reason}" if found.reason else "")


def _show_places(folder: Path, screen: Console) -> None:
    screen.print("")
    for label, place in (
        ("Report", folder / "report.html"),
        ("Merged model", folder / "merged"),
        ("Results archive", folder / "package" / "validation_results.tar.gz"),
        ("Model archive", folder / "package" / "merged_model.tar.gz"),
    ):
        screen.print(f"{label + ':':<17} {place}", markup=False, soft_wrap=True)
