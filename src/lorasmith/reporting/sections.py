"""The claims on top of the page: what was found, in a word, a sentence and a colour."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lorasmith.files.run_layout import RunRecords
from lorasmith.machine.resources import human_bytes
from lorasmith.records.proof import PairedEffect
from lorasmith.records.scoring import TaskEffect, TaskMetric
from lorasmith.reporting import figures
from lorasmith.reporting.figures import (
    MISSING,
    Axis,
    count,
    linear_axis,
    number,
    percent,
    plural,
    short_hash,
    signed,
)
from lorasmith.reporting.groups import ALL


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
    if records.judged:
        open_gates = [gate for gate in records.judged.gates if gate.verdict != "pass"]
        total = len(records.judged.gates)
        parts.append(
            f"{len(open_gates)} of {plural(total, 'gate')} did not pass"
            if open_gates
            else "the only gate passed"
            if total == 1
            else f"all {total} gates passed"
        )
    if not parts:
        return "Nothing has been measured yet.", "none"
    text = _join(parts)
    return text[0].upper() + text[1:] + ".", _worst(claims(records))


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]


def _worst(claimed: list[Claim]) -> str:
    states = {claim.state for claim in claimed}
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
    overall = proof.overall
    text = (
        f"Over {plural(overall.tokens, 'token')}: mean KL {number(overall.kl.mean)}, "
        f"loss Δ {signed(overall.loss_delta)}, the same first choice at {percent(overall.top1_agreement)}."
    )
    state = {"indistinguishable": "good", "faithful": "good"}.get(proof.grade, "warn")
    return Claim(title, proof.grade, state, text, "fidelity")


def _gates(records: RunRecords) -> Claim:
    title, gates = "The gates", records.judged
    if gates is None:
        return Claim(title, MISSING, "none", "No thresholds were checked.", "gates")
    failed = [gate.gate.name for gate in gates.gates if gate.verdict == "fail"]
    blank = [gate.gate.name for gate in gates.gates if gate.verdict == "not measured"]
    if gates.passed:
        return Claim(title, "passed", "good", _all_held(len(gates.gates)), "gates")
    parts = [f"failed: {', '.join(failed)}"] if failed else []
    parts += [f"without data: {', '.join(blank)}"] if blank else []
    word = f"{len(failed) + len(blank)} of {len(gates.gates)} did not pass"
    text = "; ".join(parts)
    return Claim(title, word, "bad" if failed else "warn", text[:1].upper() + text[1:] + ".", "gates")


def _all_held(thresholds: int) -> str:
    return "The only threshold holds." if thresholds == 1 else f"All {thresholds} thresholds hold."


def _contamination(records: RunRecords) -> Claim:
    title, check = "The test set’s independence", records.contamination
    if check is None:
        return Claim(title, MISSING, "none", "The test set was not checked.", "testset")
    state = {"independent": "good", "contaminated": "bad"}.get(check.verdict, "none")
    if check.verdict == "not checked":
        text = check.reason or "No training data was given."
    else:
        hit = len({hit.test_id for hit in check.hits if check.is_verdict(hit)})
        text = (
            f"{hit:,} of {plural(check.rows_test, 'test row')} found again in "
            f"{plural(check.rows_train, 'training row')}."
        )
    return Claim(title, check.verdict, state, text, "testset")


# The templates, what they may call, and the policy under which a page runs.


def render_page(template: str, view: dict[str, Any], *, scripts: Sequence[str] = ()) -> str:
    """A whole page: the template with our style sheet, our script and a policy that admits nothing else."""
    script = "".join(_asset(name) for name in ("page.js", *scripts))
    own = {"css": Markup(_asset("page.css")), "js": Markup(script), "policy": _policy(script)}
    return _environment().get_template(template).render({**view, **own})


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lorasmith.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        number=figures.number,
        plain=figures.plain,
        plural=figures.plural,
        signed=figures.signed,
        percent=figures.percent,
        count=figures.count,
        duration=figures.duration,
        dollars=figures.dollars,
        energy=figures.energy,
        human_bytes=human_bytes,
        comparisons={"<": "<", "<=": "≤", ">": ">", ">=": "≥", "==": "=", "!=": "≠"},
        all_examples=ALL,
    )
    return environment


def _asset(name: str) -> str:
    return (files("lorasmith.reporting") / "templates" / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """A content security policy under which only our own script runs and no request leaves the page."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


# Where everything comes from: facts for the top of the page, hashes and settings for its end.


Pairs = list[tuple[str, str]]

GLOSSARY = (
    (
        "loss",
        "Mean negative log-likelihood in nats per response token, over all tokens of the group.",
    ),
    ("perplexity", "The exponential of the loss."),
    ("interval", "Where the figure lies when the examples are drawn again, at the level given."),
    ("exact", "Every element is what the recorded rounding rule gives; everything else is the base’s bytes."),
    ("bounded", "Every element is within the number of ulps given of the exact value."),
    ("different", "Some element is not what the formula gives."),
    (
        "indistinguishable",
        "The merged model differs from the adapter by at most twice what the adapter differs from itself "
        "under another batch layout.",
    ),
    ("faithful", "All differences in behaviour lie under their thresholds."),
    ("drifted", "At least one difference in behaviour lies over its threshold."),
    (
        "KL",
        "Kullback–Leibler divergence of the two next-token distributions, full vocabulary, in nats.",
    ),
    (
        "swallowed",
        "An element whose update is so small that the stored type rounds it back to the base’s value.",
    ),
    ("ulp", "One step of the stored number format at that value."),
)


def facts(records: RunRecords) -> list[str]:
    """A line under the headline: which model, how much was measured."""
    lines = []
    result = next(iter(records.validations.values()), None)
    if result is not None:
        lines.append(f"{result.model.architecture}, {count(result.model.parameters)} parameters")
        lines.append(
            f"{plural(result.overall.examples, 'example')}, {plural(result.overall.tokens, 'token')}"
        )
        lines.append(f"{result.settings.template} template, {result.settings.arithmetic} arithmetic")
        if result.partial:
            lines.append("only a part of the test set was scored")
        if result.settings.loss_on != "response":
            lines.append("loss over prompt and response")
    elif records.statistics is not None:
        lines.append(plural(records.statistics.examples, "example"))
    if records.merge is not None:
        lines.append(f"{records.merge.precision} precision, {records.merge.rounding} rounding")
    return lines


def provenance(records: RunRecords) -> list[tuple[str, Pairs]]:
    """Titled lists of names and values; only those that have something to say."""
    blocks = [
        ("Inputs (SHA-256)", _inputs(records)),
        ("How it was scored", _scoring(records)),
        ("Merge", _merge(records)),
        ("Versions", list(records.run.versions.items()) if records.run else []),
        ("What was asked", _config(records.run.config if records.run else {})),
    ]
    return [(title, pairs) for title, pairs in blocks if pairs]


def _inputs(records: RunRecords) -> Pairs:
    given = records.run.inputs if records.run else {}
    digests = {name.replace("_", " "): sha for name, sha in given.items()}
    for role, result in records.validations.items():
        digests.setdefault("test set", result.test_set.sha256)
        digests[f"{role} per example ({result.per_example.path})"] = result.per_example.sha256
    return list(digests.items())


def _scoring(records: RunRecords) -> Pairs:
    result = next(iter(records.validations.values()), None)
    if result is None:
        return []
    settings = [
        (name.replace("_", " "), _text(value)) for name, value in result.settings if value is not None
    ]
    cut = [(f"cut rows, {role}", str(entry.truncated)) for role, entry in records.validations.items()]
    return [*settings, *cut]


def _merge(records: RunRecords) -> Pairs:
    merge = records.merge
    if merge is None:
        return []
    adapters = zip(merge.adapter_weights, merge.adapter_sha256, strict=True)
    formulas = sorted({tensor.formula for tensor in merge.tensors})
    return [
        ("formula", "; ".join(formulas) or "nothing to merge"),
        ("tensors merged, copied, cast", f"{len(merge.tensors)}, {merge.copied}, {merge.cast}"),
        ("base", merge.base_sha256),
        *((f"adapter × {weight:g}", sha) for weight, sha in adapters),
        *((file.path, f"{count(file.bytes)} bytes, {short_hash(file.sha256)}…") for file in merge.files),
    ]


def _config(config: dict[str, Any]) -> Pairs:
    given = {name: value for name, value in config.items() if name != "gates" and value is not None}
    return [(name.replace("_", " "), _text(value)) for name, value in given.items()]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# The benchmarks' own metrics: three models side by side, with what adapter and merge change.


@dataclass(frozen=True)
class TaskMark:
    """One model's value with its interval, in percent of the axis."""

    role: str
    at: float
    low: float | None
    high: float | None
    metric: TaskMetric


@dataclass(frozen=True)
class TaskRow:
    """One metric of one benchmark."""

    benchmark: str
    metric: str
    method: str
    examples: int
    marks: list[TaskMark]
    unscored: list[tuple[str, TaskMetric]]
    """Roles with answers that have no verdict, or that the limit of tokens cut off."""
    effect: TaskEffect | None
    """Adapter against base."""
    merge: TaskEffect | None
    """Merged against adapter."""


@dataclass(frozen=True)
class TaskTable:
    """All benchmarks on one axis from 0 to 1."""

    axis: Axis
    roles: list[str]
    rows: list[TaskRow]


def task_table(records: RunRecords) -> TaskTable | None:
    """None where no model answered the benchmarks' questions."""
    if not records.tasks:
        return None
    axis = linear_axis([0.0, 1.0])
    by_metric: dict[tuple[str, str], dict[str, TaskMetric]] = {}
    for role, result in records.tasks.items():
        for metric in result.metrics:
            by_metric.setdefault((metric.benchmark, metric.metric), {})[role] = metric
    effects = records.comparison.task_effects if records.comparison else {}
    rows = [
        TaskRow(
            benchmark=benchmark,
            metric=name,
            method=next(iter(roles.values())).method,
            examples=max(metric.examples for metric in roles.values()),
            marks=[_mark(axis, role, metric) for role, metric in roles.items() if metric.value is not None],
            unscored=[
                (role, metric) for role, metric in roles.items() if metric.unscored or metric.hit_limit
            ],
            effect=_effect(effects.get("effect", []), benchmark, name),
            merge=_effect(effects.get("merge", []), benchmark, name),
        )
        for (benchmark, name), roles in sorted(by_metric.items())
    ]
    return TaskTable(axis, list(records.tasks), rows)


def _mark(axis: Axis, role: str, metric: TaskMetric) -> TaskMark:
    span = metric.interval
    return TaskMark(
        role,
        axis.at(metric.value or 0.0),
        axis.at(span.low) if span else None,
        axis.at(span.high) if span else None,
        metric,
    )


def _effect(effects: list[TaskEffect], benchmark: str, metric: str) -> TaskEffect | None:
    return next((one for one in effects if (one.benchmark, one.metric) == (benchmark, metric)), None)
