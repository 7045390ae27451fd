"""The claims on top of the page: what was found, in a word, a sentence and a colour."""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.records.proof import PairedEffect
from lorasmith.reporting.figures import MISSING, count, number, percent, plural, signed
from lorasmith.reporting.load import RunRecords


@dataclass(frozen=True)
class Claim:
    """One claim: `state` is `good`, `warn`, `bad` or `none`."""

    title: str
    word: str
    state: str
    sentence: str
    anchor: str
    """The section that holds the evidence."""


def claims(records: RunRecords) -> list[Claim]:
    """The five claims of a release, measured or not."""
    return [
        _adapter(records),
        _weights(records),
        _behaviour(records),
        _gates(records),
        _contamination(records),
    ]


def headline(records: RunRecords) -> tuple[str, str]:
    """The whole page in one sentence, and its state."""
    parts = []
    if records.comparison and records.comparison.adapter_effect:
        effect = records.comparison.adapter_effect.verdict
        words = {"helps": "The adapter helps", "hurts": "The adapter hurts"}
        parts.append(words.get(effect, "The adapter has no clear effect"))
    if records.weights:
        grade = records.weights.grade
        words = {
            "exact": "the merged weights are exact",
            "bounded": f"the merged weights are within {records.weights.bound_ulps} ulp of exact",
            "different": "the merged weights are not this merge",
        }
        parts.append(words.get(grade, f"the merged weights are {grade}"))
    if records.behaviour and records.behaviour.grade != MISSING:
        words = {
            "indistinguishable": "the merged model cannot be told from the adapter",
            "faithful": "the merged model is faithful to the adapter",
            "drifted": "the merged model drifted from the adapter",
        }
        parts.append(words.get(records.behaviour.grade, records.behaviour.grade))
    if records.gates:
        open_gates = [gate for gate in records.gates.gates if gate.verdict != "pass"]
        total = len(records.gates.gates)
        parts.append(
            f"{len(open_gates)} of {plural(total, 'gate')} did not pass"
            if open_gates
            else f"all {plural(total, 'gate')} pass"
        )
    if not parts:
        return "Nothing has been measured yet.", "none"
    text = _join(parts)
    return text[0].upper() + text[1:] + ".", _worst(claims(records))


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]


def _worst(found: list[Claim]) -> str:
    states = {claim.state for claim in found}
    return next((state for state in ("bad", "warn", "good") if state in states), "none")


def describe_effect(effect: PairedEffect) -> str:
    """`loss 2.31 → 1.20 nats per token (Δ −1.11, 95 % interval −1.20 … −1.02)`."""
    span = effect.interval
    interval = (
        f", {100 * span.level:.0f} % interval {signed(span.low)} … {signed(span.high)}"
        if span
        else ", without an interval"
    )
    return (
        f"loss {number(effect.loss_a)} → {number(effect.loss_b)} nats per token "
        f"(Δ {signed(effect.loss_delta)}{interval})"
    )


def _adapter(records: RunRecords) -> Claim:
    effect = records.comparison.adapter_effect if records.comparison else None
    if effect is None:
        text = "The adapter was not compared with its base."
        return Claim("The adapter on this test set", MISSING, "none", text, "effect")
    state = {"helps": "good", "hurts": "bad"}.get(effect.verdict, "warn")
    text = f"On {plural(effect.examples, 'example')}: {describe_effect(effect)}."
    return Claim("The adapter on this test set", effect.verdict, state, text, "effect")


def _weights(records: RunRecords) -> Claim:
    title, proof = "The merged weights", records.weights
    if proof is None:
        return Claim(title, MISSING, "none", "The weights were not recomputed.", "fidelity")
    checked = f"{count(proof.elements_checked)} elements in {plural(proof.tensors_checked, 'tensor')}"
    used = f"{proof.adapter_tensors_used} of {proof.adapter_tensors_total} adapter tensors were used"
    wrong = sum(tensor.wrong for tensor in proof.tensors)
    sentence = {
        "exact": f"Recomputed on their own, {checked} are what the rounding rule gives; {used}.",
        "bounded": f"{checked}: none is further than {proof.bound_ulps} ulp from exact; {used}.",
    }.get(proof.grade, f"{count(wrong)} of {checked} are not what the formula gives; {used}.")
    state = {"exact": "good", "bounded": "warn"}.get(proof.grade, "bad")
    return Claim(title, proof.grade, state, sentence, "fidelity")


def _behaviour(records: RunRecords) -> Claim:
    title, proof = "The merged model’s behaviour", records.behaviour
    if proof is None or proof.grade == MISSING:
        return Claim(title, MISSING, "none", "Adapter and merged model were not compared.", "fidelity")
    found = proof.overall
    text = (
        f"Over {plural(found.tokens, 'token')}: mean KL {number(found.kl.mean)}, "
        f"loss Δ {signed(found.loss_delta)}, the same first choice at {percent(found.top1_agreement)}."
    )
    state = {"indistinguishable": "good", "faithful": "good"}.get(proof.grade, "warn")
    return Claim(title, proof.grade, state, text, "fidelity")


def _gates(records: RunRecords) -> Claim:
    title, gates = "The gates", records.gates
    if gates is None:
        return Claim(title, MISSING, "none", "No thresholds were checked.", "gates")
    failed = [gate.gate.name for gate in gates.gates if gate.verdict == "fail"]
    blank = [gate.gate.name for gate in gates.gates if gate.verdict == "not measured"]
    if gates.passed:
        return Claim(title, "all pass", "good", f"{plural(len(gates.gates), 'threshold')} hold.", "gates")
    parts = [f"failed: {', '.join(failed)}"] if failed else []
    parts += [f"without data: {', '.join(blank)}"] if blank else []
    word = f"{len(failed) + len(blank)} of {len(gates.gates)} open"
    text = "; ".join(parts)
    return Claim(title, word, "bad" if failed else "warn", text[:1].upper() + text[1:] + ".", "gates")


def _contamination(records: RunRecords) -> Claim:
    title, found = "The test set’s independence", records.contamination
    if found is None:
        return Claim(title, MISSING, "none", "The test set was not checked.", "testset")
    state = {"independent": "good", "contaminated": "bad"}.get(found.verdict, "none")
    if found.verdict == "not checked":
        text = found.reason or "No training data was given."
    else:
        hit = len({hit.test_id for hit in found.hits})
        text = (
            f"{hit:,} of {plural(found.rows_test, 'test row')} found again in "
            f"{plural(found.rows_train, 'training row')}."
        )
    return Claim(title, found.verdict, state, text, "testset")
