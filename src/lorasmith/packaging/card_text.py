"""The body of a model card: claims, recipe, figures, limits, how to use and to check it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasmith.packaging.card_claims import claims, count, plain
from lorasmith.packaging.card_metadata import Licence
from lorasmith.records.scoring import GroupMetrics

if TYPE_CHECKING:
    from lorasmith.packaging.card import CardRecords


def body(records: CardRecords, *, title: str, base_model: str | None, licence: Licence) -> str:
    """Markdown; nothing of a test set's text is in it."""
    sections = [
        f"# {plain(title)}",
        _summary(records, base_model),
        "## Claims",
        claims(records),
        "## How it was made",
        _recipe(records),
        "## Measured",
        _figures(records),
        "## Limits",
        _limits(records),
        "## Use",
        _USE,
        "## Check it",
        _CHECK,
        "## Licence",
        _licence(licence),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(records: CardRecords, base_model: str | None) -> str:
    model = records.validations["merged"].model
    origin = (
        f"[{base_model}](https://huggingface.co/{base_model})"
        if base_model
        else f"the base model with digest `{records.merge.base_sha256[:16]}…`"
    )
    return (
        f"A standalone model ({plain(model.architecture)}, {model.parameters:,} parameters): {origin} with "
        f"{count(len(records.merge.adapter_sha256), 'LoRA adapter')} merged into its weights. "
        "PEFT is not needed."
    )


def _recipe(records: CardRecords) -> str:
    merge = records.merge
    formulas = sorted({tensor.formula for tensor in merge.tensors})
    scales = sorted({tensor.scale for tensor in merge.tensors if tensor.scale is not None})
    rows = [
        ("formula", "; ".join(f"`{formula}`" for formula in formulas) or "nothing to merge"),
        ("scale s", ", ".join(f"{scale:g}" for scale in scales) or "–"),
        ("precision", "as each tensor of the base" if merge.precision == "base" else merge.precision),
        ("rounding", merge.rounding + (f", seed {merge.seed}" if merge.rounding == "dithered" else "")),
        ("tensors", f"{len(merge.tensors)} merged, {merge.copied} copied, {merge.cast} cast"),
        (
            "updates lost to rounding",
            f"{merge.swallowed_fraction:.2%} of {merge.elements_updated:,} updated elements",
        ),
        ("base", f"SHA-256 `{merge.base_sha256}`"),
        *(
            (f"adapter, weight {weight:g}", f"SHA-256 `{sha}`")
            for sha, weight in zip(merge.adapter_sha256, merge.adapter_weights, strict=True)
        ),
        ("made with", f"lorasmith {merge.lorasmith_version}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"| | |\n|---|---|\n{table}"


def _figures(records: CardRecords) -> str:
    settings = records.validations["merged"].settings
    scored = "response tokens" if settings.loss_on == "response" else "prompt and response tokens"
    lead = (
        f"Loss in nats per token over {scored} ({settings.template} template, {settings.arithmetic} "
        "arithmetic), 95 % intervals by bootstrap over examples; test set SHA-256 "
        f"`{records.validations['merged'].test_set.sha256}`."
    )
    roles = list(records.validations)
    lines = [
        f"| set | examples | {' | '.join(f'{role} loss' for role in roles)} | merged perplexity |",
        "|---|---:|" + "---:|" * (len(roles) + 1),
    ]
    merged = records.validations["merged"]
    groups: dict[str, GroupMetrics] = {"all": merged.overall, **merged.groups.get("source", {})}
    for name, metrics in groups.items():
        cells = [
            _loss(result.overall if name == "all" else result.groups.get("source", {}).get(name))
            for result in records.validations.values()
        ]
        shown = plain(name)
        lines.append(f"| {shown} | {metrics.examples:,} | {' | '.join(cells)} | {metrics.perplexity:.4f} |")
    parts = [lead, "\n".join(lines)]
    if records.tasks:
        parts.append(_tasks(records))
    return "\n\n".join(parts)


def _loss(metrics: GroupMetrics | None) -> str:
    if metrics is None:
        return "–"
    span = metrics.interval
    return f"{metrics.loss:.4f}" + (f" [{span.low:.4f}, {span.high:.4f}]" if span else "")


def _tasks(records: CardRecords) -> str:
    values: dict[tuple[str, str], dict[str, str]] = {}
    for role, result in records.tasks.items():
        for metric in result.metrics:
            text = "unscored" if metric.value is None else f"{metric.value:.1%} of {metric.scored}"
            values.setdefault((metric.benchmark, metric.metric), {})[role] = text
    roles = list(records.tasks)
    lines = [f"| benchmark | metric | {' | '.join(roles)} |", "|---|---|" + "---:|" * len(roles)]
    for (benchmark, name), found in values.items():
        cells = " | ".join(found.get(role, "–") for role in roles)
        lines.append(f"| {plain(benchmark)} | {plain(name)} | {cells} |")
    return "\n".join(lines)


def _limits(records: CardRecords) -> str:
    merged = records.validations["merged"]
    found = [
        f"The figures hold for the {count(merged.overall.examples, 'example')} of this test set; nothing "
        "else was measured, such as safety, bias, other languages or long conversations."
    ]
    check = records.contamination
    if check is None or check.verdict == "not checked":
        found.append("The test set was not compared with the training data: it may hold rows of it.")
    elif check.verdict == "contaminated":
        found.append("The test set holds rows of the training data: the adapter's figures are too good.")
    else:
        found.append(f"No row of the test set was found in the {check.rows_train:,} training rows given.")
    if merged.partial:
        found.append("Only a part of the test set was scored.")
    if merged.truncated:
        found.append(f"{count(merged.truncated, 'row')} of the test set were cut at the longest length.")
    if records.behaviour and records.behaviour.grade == "drifted":
        found.append(f"The merged model is not the adapter: {'; '.join(records.behaviour.reasons)}.")
    for result in records.gates.gates if records.gates else []:
        if result.verdict != "pass":
            found.append(f"Gate {plain(result.gate.name)}: {result.verdict}.")
    hurt = _hurt_groups(records)
    if hurt:
        found.append(f"The adapter hurts on {', '.join(plain(name) for name in hurt)}.")
    return "\n".join(f"- {text}" for text in found)


def _hurt_groups(records: CardRecords) -> list[str]:
    if records.comparison is None:
        return []
    return [
        f"{kind} {name}"
        for kind in ("source", "domain", "difficulty")
        for name, effect in records.comparison.adapter_effect_groups.get(kind, {}).items()
        if effect.verdict == "hurts"
    ]


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""

_CHECK = """`lorasmith_merge.json` lists every file with its SHA-256 and what became of every tensor. With
base and adapter at hand, the weights are proved again by

```
lorasmith prove --base BASE --adapter ADAPTER --merged .
```"""


def _licence(licence: Licence) -> str:
    if not licence.fields:
        return "The base's folder names no licence. Its terms, whatever they are, hold for this model too."
    name = licence.fields.get("license_name") or licence.fields.get("license", "")
    return f"As the base: {plain(name)} (from {licence.source})."
