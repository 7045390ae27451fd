"""How merges and proofs look in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.cli.console import plain, table
from lorasmith.cli.views.records import PARTIAL, show_findings

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from lorasmith.records.merging import MergeRecord
    from lorasmith.records.proof import (
        BehaviourProof,
        ComparisonRecord,
        PairedEffect,
        TensorProof,
        TokenComparison,
        WeightProof,
    )
    from lorasmith.records.scoring import TaskEffect


_INTO = {
    "16bit": "The quantized base was dequantized exactly and merged in 16 bits",
    "base": "Merged back onto the grid of the quantized base, in its own format",
}


def show_merge(record: MergeRecord, console: Console) -> None:
    """What the merge changed, and how much of the update rounding swallowed."""
    if record.into:
        console.print(_INTO[record.into])
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
            (
                plain(one.tensor),
                plain(str(one.index)),
                str(one.found),
                str(one.expected),
                str(one.ulps),
            )
            for one in proof.differences[:10]
        ]
        columns = ("tensor", "index", "found", "expected", "ulps")
        console.print(table("First differences", columns, rows))
    show_findings(proof.findings, console)


_WRONG_COLUMNS = ("tensor", "kind", "elements", "wrong", "largest distance in ulps")


def _wrong_row(tensor: TensorProof) -> tuple[str, ...]:
    return (
        plain(tensor.name),
        tensor.kind,
        f"{tensor.elements:,}",
        f"{tensor.wrong:,}",
        f"{tensor.max_ulps:,}",
    )


def show_behaviour(proof: BehaviourProof, console: Console) -> None:
    """The grade of the behaviour and the numbers that decided it, beside the noise floor."""
    colour = {"drifted": "red", "not measured": "yellow"}.get(proof.grade, "green")
    part = f" ({PARTIAL})" if proof.partial else ""
    console.print(f"Behaviour: [{colour}]{proof.grade}[/] on {proof.overall.tokens:,} tokens{part}")
    for reason in proof.reasons:
        console.print(f"  {reason}", markup=False, soft_wrap=True)
    against = [(proof.overall, "measured"), (proof.floor, "noise floor")]
    if proof.serving:
        against.append((proof.serving, f"adapter in {proof.serving_layouts[-1].split(', ')[-1]}"))
    rows = [
        (name, *(show(other) if other else "not measured" for other, _ in against))
        for name, show in _COMPARED
    ]
    columns = ("adapter against merged", *(title for _, title in against))
    console.print(table("Token by token", columns, rows))
    _show_sources(proof, console)
    _show_flips(proof, console)
    if proof.generation:
        wrote = proof.generation
        console.print(
            f"Greedy answers up to {wrote.max_new_tokens} tokens: {wrote.same} of {wrote.examples} alike,"
            f" {wrote.tokens_before_divergence:.1f} tokens before the first difference on average"
        )
    show_findings(proof.findings, console)


def _kl_mean(pair: TokenComparison) -> str:
    error = pair.kl.standard_error
    return f"{pair.kl.mean:.2e}" + ("" if error is None else f" ± {error:.0e}")


_COMPARED: tuple[tuple[str, Callable[[TokenComparison], str]], ...] = (
    ("tokens", lambda pair: f"{pair.tokens:,}"),
    ("loss Δ", lambda pair: f"{pair.loss_delta:+.2e}"),
    ("perplexity Δ", lambda pair: f"{pair.perplexity_delta:+.2e}"),
    ("perplexity ratio", lambda pair: f"{pair.perplexity_ratio:.6f}"),
    ("mean KL", _kl_mean),
    ("median KL", lambda pair: f"{pair.kl.median:.2e}"),
    ("90 % KL", lambda pair: f"{pair.kl.q90:.2e}"),
    ("95 % KL", lambda pair: f"{pair.kl.q95:.2e}"),
    ("99 % KL", lambda pair: f"{pair.kl.q99:.2e}"),
    ("99.9 % KL", lambda pair: f"{pair.kl.q999:.2e}"),
    ("largest KL", lambda pair: f"{pair.kl.max:.2e}"),
    ("mean Δp", lambda pair: f"{pair.delta_p_mean:+.2e}"),
    ("RMS Δp", lambda pair: f"{pair.delta_p_rms:.2e}"),
    ("largest |Δ log p|", lambda pair: f"{pair.max_abs_delta:.2e}"),
    ("top-1 agreement", lambda pair: f"{pair.top1_agreement:.2%}"),
)


def _show_sources(proof: BehaviourProof, console: Console) -> None:
    sources = proof.groups.get("source", {})
    wrote = proof.generation.groups.get("source", {}) if proof.generation else {}
    rows = [
        (
            plain(name),
            f"{pair.tokens:,}",
            f"{pair.loss_delta:+.2e}",
            _kl_mean(pair),
            f"{pair.kl.q999:.2e}",
            f"{pair.top1_agreement:.2%}",
            *([f"{wrote[name].same} of {wrote[name].examples}"] if name in wrote else []),
        )
        for name, pair in sources.items()
    ]
    if len(rows) > 1:
        columns: tuple[str, ...] = ("source", "tokens", "loss Δ", "mean KL", "99.9 % KL", "top-1")
        if wrote:
            columns += ("same answers",)
        console.print(table("By source", columns, rows))


SHOWN_FLIPS = 5
"""Positions with another likeliest token that the terminal lists; the record has all of them."""


def _show_flips(proof: BehaviourProof, console: Console) -> None:
    if not proof.flips:
        return
    worst = sorted(proof.flips, key=lambda flip: -flip.margin)[:SHOWN_FLIPS]
    rows = [
        (plain(flip.example), str(flip.position), str(flip.token_a), str(flip.token_b), f"{flip.margin:.2e}")
        for flip in worst
    ]
    title = f"Other likeliest token at {len(proof.flips):,} of {proof.overall.tokens:,} positions"
    columns = ("row", "position", "adapter's", "merged's", "margin in nats")
    console.print(table(title + (", by margin" if len(rows) > 1 else ""), columns, rows))


def show_comparison(record: ComparisonRecord, console: Console) -> None:
    """What the adapter does to the base, by source and metric as well, and what the merge does to it."""
    effects = [("merged against adapter", record.merge_effect)]
    if record.adapter_effect:
        effects.insert(0, ("adapter against base", record.adapter_effect))
    rows = [_effect_row(name, effect) for name, effect in effects]
    sources = record.adapter_effect_groups.get("source", {})
    if len(sources) > 1:
        rows[1:1] = [_effect_row(plain(f"  on {name}"), effect) for name, effect in sources.items()]
    columns = ("", "Δ", "95 % interval", "p", "verdict")
    console.print(table("Effects on the loss", columns, rows))
    for kind, title in (("effect", "adapter against base"), ("merge", "merged against adapter")):
        effects_on_tasks = record.task_effects.get(kind, [])
        if effects_on_tasks:
            metrics = [
                (plain(f"{one.benchmark} {one.metric}"), f"{one.delta:+.2%}", *_judged(one, "{:+.2%}"))
                for one in effects_on_tasks
            ]
            console.print(table(f"Effects on the benchmarks' own metrics, {title}", columns, metrics))


def _effect_row(name: str, effect: PairedEffect) -> tuple[str, ...]:
    return (name, f"{effect.loss_delta:+.6f}", *_judged(effect, "{:+.6f}"))


def _judged(effect: PairedEffect | TaskEffect, number: str) -> tuple[str, str, str]:
    """Interval, p-value and verdict."""
    interval = effect.interval
    colour = {"helps": "green", "hurts": "red"}.get(effect.verdict)
    span = f"{number.format(interval.low)} to {number.format(interval.high)}" if interval else "not measured"
    return span, f"{effect.p_value:.2g}", f"[{colour}]{effect.verdict}[/]" if colour else effect.verdict
