"""The claims of a model card, in the words of the records and no stronger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.records.proof import BehaviourProof, PairedEffect, WeightProof

if TYPE_CHECKING:
    from lorasmith.packaging.card import CardRecords

_WEIGHTS = {
    "exact": "every element is what the recorded rounding rule gives, every other tensor has the base's "
    "bytes or its correctly rounded cast, and every adapter tensor was used exactly once",
    "bounded": "every element lies within {bound} ulps of the exact merge",
    "different": "the stored weights are NOT this merge",
}
_BEHAVIOUR = {
    "indistinguishable": "its divergence from the adapter is at most twice what the adapter shows against "
    "itself under another batch layout",
    "faithful": "all differences from the adapter lie under their thresholds",
    "drifted": "at least one difference from the adapter lies over its threshold",
}
_EFFECT = {
    "helps": "the adapter helps on this test set",
    "hurts": "the adapter HURTS on this test set",
    "no clear effect": "the adapter has no clear effect on this test set",
}


def plain(text: str) -> str:
    """Text that cannot become markup or leave its cell."""
    flat = " ".join(text.split())
    for character in "\\`*_<>|[]":
        flat = flat.replace(character, f"&#{ord(character)};")
    return flat


def count(number: int, noun: str) -> str:
    """`1 example`, `2,000 examples`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def claims(records: CardRecords) -> str:
    """A list, one claim an item; what was not measured says so."""
    effect = records.comparison.adapter_effect if records.comparison else None
    rows = [_weights(records.weights), _behaviour(records.behaviour), _effect(effect)]
    if records.gates:
        passed = sum(gate.verdict == "pass" for gate in records.gates.gates)
        rows.append(f"**Gates**: {passed} of {len(records.gates.gates)} passed.")
    return "\n".join(f"- {row}" for row in rows)


def _weights(proof: WeightProof | None) -> str:
    if proof is None:
        return "**Weights: not measured**: they were not recomputed."
    text = _WEIGHTS[proof.grade].format(bound=proof.bound_ulps)
    checked = f"{proof.elements_checked:,} elements of {count(proof.tensors_checked, 'tensor')} recomputed"
    return f"**Weights: {proof.grade}**: {text} ({checked})."


def _behaviour(proof: BehaviourProof | None) -> str:
    if proof is None or proof.grade not in _BEHAVIOUR:
        return "**Behaviour: not measured**: adapter and merged model were not compared."
    found = proof.overall
    return (
        f"**Behaviour: {proof.grade}**: {_BEHAVIOUR[proof.grade]} (over {count(found.tokens, 'token')}: "
        f"loss Δ {found.loss_delta:+.2e}, mean KL {found.kl.mean:.2e} nats, the same likeliest token at "
        f"{found.top1_agreement:.2%})."
    )


def _effect(effect: PairedEffect | None) -> str:
    if effect is None:
        return "**Adapter: not measured**: it was not compared with its base."
    span = effect.interval
    interval = f", 95 % interval {span.low:+.4f} to {span.high:+.4f}" if span else ""
    return (
        f"**Adapter: {effect.verdict}**: {_EFFECT[effect.verdict]} (loss Δ {effect.loss_delta:+.4f} nats per "
        f"token against the base{interval}, {count(effect.examples, 'example')})."
    )
