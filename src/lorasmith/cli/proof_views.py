"""How merges and proofs look in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.cli.console import table
from lorasmith.cli.views import show_findings

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from lorasmith.records.merging import MergeRecord
    from lorasmith.records.proof import (
        BehaviourProof,
        ComparisonRecord,
        PairedEffect,
        TensorProof,
        WeightProof,
    )


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
