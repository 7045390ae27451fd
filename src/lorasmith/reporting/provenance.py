"""Where everything comes from: facts for the top of the page, hashes and settings for its end."""

from __future__ import annotations

import json
from typing import Any

from lorasmith.reporting.figures import count, plural, short_hash
from lorasmith.reporting.load import RunRecords

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
    found = []
    result = next(iter(records.validations.values()), None)
    if result is not None:
        found.append(f"{result.model.architecture}, {count(result.model.parameters)} parameters")
        found.append(
            f"{plural(result.overall.examples, 'example')}, {plural(result.overall.tokens, 'token')}"
        )
        found.append(f"{result.settings.template} template, {result.settings.arithmetic} arithmetic")
        if result.partial:
            found.append("only a part of the test set was scored")
        if result.settings.loss_on != "response":
            found.append("loss over prompt and response")
    elif records.statistics is not None:
        found.append(plural(records.statistics.examples, "example"))
    if records.merge is not None:
        found.append(f"{records.merge.precision} precision, {records.merge.rounding} rounding")
    return found


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
    found = {name.replace("_", " "): sha for name, sha in given.items()}
    for role, result in records.validations.items():
        found.setdefault("test set", result.test_set.sha256)
        found[f"{role} per example ({result.per_example.path})"] = result.per_example.sha256
    return list(found.items())


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
