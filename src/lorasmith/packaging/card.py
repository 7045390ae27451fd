"""The model card of the merged model: `README.md`, made from the records alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.benchmarks.fetch import SOURCES
from lorasmith.files.atomic import write_bytes
from lorasmith.files.digests import CARD
from lorasmith.files.run_layout import GATES, MEASURED, MERGE, TASKS, VALIDATIONS, RunRecords, load_records
from lorasmith.hub.cache import origin_of
from lorasmith.parsing import parse_json
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, PairedEffect, WeightProof
from lorasmith.records.scoring import GroupMetrics, TaskResult, ValidationResult

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


# The front matter of a model card: base, licence, and figures with the sets they were measured on.


_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Licence:
    """What the base says about its licence."""

    fields: dict[str, str]
    """`license`, `license_name`, `license_link` of a card, as far as they are there."""
    source: str
    """Where this was read, in words; empty where nothing was found."""


def base_licence(base: Path) -> Licence:
    """The licence by the base's own model card, else from a licence file that lies beside its weights."""
    from huggingface_hub.repocard import metadata_load

    files = sorted(
        file.name
        for file in base.iterdir()
        if file.is_file() and file.name.startswith(("LICENSE", "LICENCE"))
    )
    card = base / CARD
    if card.is_file():
        try:
            metadata = metadata_load(card) or {}
        except Exception:  # any YAML error: a card that cannot be read says nothing
            metadata = {}
        fields = {key: metadata[key] for key in _LICENCE_KEYS if isinstance(metadata.get(key), str)}
        if fields:
            return Licence(fields, "the base's model card")
    if files:
        named = {"license": "other", "license_name": "as-the-base", "license_link": files[0]}
        return Licence(named, f"the base's {files[0]}")
    return Licence({}, "")


def base_name(base: Path, adapter: Path, given: str | None = None) -> str | None:
    """`org/name` of the base that was used: as given, or by the cache it lies in.

    What the adapter's config names is the base it was trained on. It is taken only where the base's folder or
    config bears the same name: a card that claims another base than the one in the weights misleads.
    """
    if given:
        return given
    origin = origin_of(base)
    if origin:
        return origin.repository
    named = _named(adapter / "adapter_config.json", "base_model_name_or_path")
    own = (base.resolve().name, _named(base / "config.json", "_name_or_path"))
    if named and _NAME.fullmatch(named) and not Path(named).exists():
        short = named.rpartition("/")[2].casefold()
        if any(short == name.rpartition("/")[2].casefold() for name in own if name):
            return named
    return None


def _named(file: Path, key: str) -> str | None:
    """A text in a JSON file of a model; None where there is none."""
    try:
        value = parse_json(file.read_bytes()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None


def evaluations(merged: ValidationResult, tasks: TaskResult | None) -> list[EvalResult]:
    """The merged model's figures, each with the set it was measured on."""
    figures = _results("all examples", "lorasmith-test-set", merged.overall, merged)
    for name, metrics in merged.groups.get("source", {}).items():
        figures += _results(name, dataset_id(name), metrics, merged)
    for metric in tasks.metrics if tasks else []:
        if metric.value is not None:
            about = {"scored": metric.scored, "unscored": metric.unscored, "method": metric.method}
            figures.append(
                _result(metric.benchmark, dataset_id(metric.benchmark), merged, about).made(
                    metric.metric, metric.value, f"{metric.metric} ({metric.method})"
                )
            )
    return figures


def dataset_id(source: str) -> str:
    """The hub's name of a benchmark; a slug of its own name for any other set."""
    known = SOURCES.get(source)
    return known.repository if known else re.sub(r"[^\w.-]+", "-", source.lower()).strip("-") or "unnamed"


@dataclass(frozen=True)
class _Target:
    """The set of some results; what stands in `args` is how much of it was used."""

    dataset: dict[str, Any]

    def made(self, kind: str, value: float, name: str) -> EvalResult:
        from huggingface_hub import EvalResult

        return EvalResult(
            task_type="text-generation",
            metric_type=kind,
            metric_value=value,
            metric_name=name,
            **self.dataset,
        )


def _result(name: str, identifier: str, result: ValidationResult, about: dict[str, Any]) -> _Target:
    return _Target(
        {
            "dataset_type": identifier,
            "dataset_name": f"{name} (part of this model's test set)",
            "dataset_args": {**about, "test_set_sha256": result.test_set.sha256},
        }
    )


def _results(name: str, identifier: str, metrics: GroupMetrics, result: ValidationResult) -> list[EvalResult]:
    about = {
        "examples": metrics.examples,
        "tokens": metrics.tokens,
        "loss_on": result.settings.loss_on,
        "template": result.settings.template,
    }
    target = _result(name, identifier, result, about)
    return [
        target.made("loss", metrics.loss, "mean negative log-likelihood, nats per response token"),
        target.made("perplexity", metrics.perplexity, "exponential of the loss"),
    ]


# The claims of a model card, in the words of the records and no stronger.


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


def claims(records: RunRecords) -> str:
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
    overall = proof.overall
    return (
        f"**Behaviour: {proof.grade}**: {_BEHAVIOUR[proof.grade]} (over {count(overall.tokens, 'token')}: "
        f"loss Δ {overall.loss_delta:+.2e}, mean KL {overall.kl.mean:.2e} nats, the same likeliest token at "
        f"{overall.top1_agreement:.2%})."
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


# The body of a model card: claims, recipe, figures, limits, how to use and to check it.


def body(
    records: RunRecords, merge: MergeRecord, *, title: str, base_model: str | None, licence: Licence
) -> str:
    """Markdown; nothing of a test set's text is in it."""
    sections = [
        f"# {plain(title)}",
        _summary(records, merge, base_model),
        "## Claims",
        claims(records),
        "## How it was made",
        _recipe(merge),
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


def _summary(records: RunRecords, merge: MergeRecord, base_model: str | None) -> str:
    model = records.validations["merged"].model
    origin = (
        f"[{base_model}](https://huggingface.co/{base_model})"
        if base_model
        else f"the base model with digest `{merge.base_sha256[:16]}…`"
    )
    return (
        f"A standalone model ({plain(model.architecture)}, {model.parameters:,} parameters): {origin} with "
        f"{count(len(merge.adapter_sha256), 'LoRA adapter')} merged into its weights. "
        "PEFT is not needed."
    )


def _recipe(merge: MergeRecord) -> str:
    formulas = sorted({tensor.formula for tensor in merge.tensors})
    scales = sorted({tensor.scale for tensor in merge.tensors if tensor.scale is not None})
    rows = [
        ("formula", "; ".join(f"`{formula}`" for formula in formulas) or "nothing to merge"),
        ("scale s", ", ".join(f"{scale:g}" for scale in scales) or "–"),
        ("precision", "as each tensor of the base" if merge.precision == "base" else merge.precision),
        *([("quantized base, merged into", merge.into)] if merge.into else []),
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


def _figures(records: RunRecords) -> str:
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


def _tasks(records: RunRecords) -> str:
    values: dict[tuple[str, str], dict[str, str]] = {}
    for role, result in records.tasks.items():
        for metric in result.metrics:
            text = "unscored" if metric.value is None else f"{metric.value:.1%} of {metric.scored}"
            values.setdefault((metric.benchmark, metric.metric), {})[role] = text
    roles = list(records.tasks)
    lines = [f"| benchmark | metric | {' | '.join(roles)} |", "|---|---|" + "---:|" * len(roles)]
    for (benchmark, name), by_role in values.items():
        cells = " | ".join(by_role.get(role, "–") for role in roles)
        lines.append(f"| {plain(benchmark)} | {plain(name)} | {cells} |")
    return "\n".join(lines)


def _limits(records: RunRecords) -> str:
    merged = records.validations["merged"]
    limits = [
        f"The figures hold for the {count(merged.overall.examples, 'example')} of this test set; nothing "
        "else was measured, such as safety, bias, other languages or long conversations."
    ]
    check = records.contamination
    if check is None or check.verdict == "not checked":
        limits.append("The test set was not compared with the training data: it may hold rows of it.")
    elif check.verdict == "contaminated":
        limits.append("The test set holds rows of the training data: the adapter's figures are too good.")
    else:
        limits.append(f"No row of the test set was found in the {check.rows_train:,} training rows given.")
    if merged.partial:
        limits.append("Only a part of the test set was scored.")
    if merged.truncated:
        limits.append(f"{count(merged.truncated, 'row')} of the test set were cut at the longest length.")
    if records.behaviour and records.behaviour.grade == "drifted":
        limits.append(f"The merged model is not the adapter: {'; '.join(records.behaviour.reasons)}.")
    for warning in records.merge.base_warnings if records.merge else []:
        limits.append(f"{plain(warning.message[:1].upper() + warning.message[1:])}.")
    for result in records.gates.gates if records.gates else []:
        if result.verdict != "pass":
            limits.append(f"Gate {plain(result.gate.name)}: {result.verdict}.")
    hurt = _hurt_groups(records)
    if hurt:
        limits.append(f"The adapter hurts on {', '.join(plain(name) for name in hurt)}.")
    return "\n".join(f"- {text}" for text in limits)


def _hurt_groups(records: RunRecords) -> list[str]:
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


def write_card(
    run: Path, *, base: Path, adapter: Path, base_model: str | None = None, name: str | None = None
) -> None:
    """Write `merged/README.md` of a run, through huggingface_hub's card classes.

    `base_model` (`org/name`) is what the card links to; without it the hub's cache tells, or the adapter's
    config where the base bears the same name. `name` is the model's in the index of figures. The licence is
    the base's. The card is a function of the records and of base and adapter: no times, no paths. Raises
    `InputError` for a record that is missing or damaged.
    """
    records = load_records(run, {*MEASURED, *TASKS.values(), GATES})
    merge = MERGE.required(records.merge, run)
    VALIDATIONS["merged"].required(records.validations.get("merged"), run)
    text = card_text(records, merge, base_licence(base), base_name(base, adapter, base_model), name)
    write_bytes(run / "merged" / CARD, text.encode())


def card_text(
    records: RunRecords, merge: MergeRecord, licence: Licence, base_model: str | None, name: str | None
) -> str:
    """Front matter and body."""
    from huggingface_hub import ModelCard, ModelCardData

    merged = records.validations["merged"]
    architecture = merged.model.architecture
    title = name or (f"{base_model.split('/')[1]}-merged" if base_model else f"{architecture}-merged")
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lora", "merged", "lorasmith"],
        license=licence.fields.get("license"),
        license_name=licence.fields.get("license_name"),
        license_link=licence.fields.get("license_link"),
        model_name=title,
        eval_results=evaluations(merged, records.tasks.get("merged")),
    )
    if base_model:
        data["base_model_relation"] = "finetune"
    text = body(records, merge, title=title, base_model=base_model, licence=licence)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
