"""The front matter of a model card: base, licence, and figures with the sets they were measured on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.benchmarks.sources import SOURCES
from lorasmith.files.digests import CARD
from lorasmith.files.hub import origin_of
from lorasmith.records.scoring import GroupMetrics, TaskResult, ValidationResult

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

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
    """From the base's own model card, else from a licence file that lies beside its weights."""
    from huggingface_hub.repocard import metadata_load

    files = sorted(
        file.name
        for file in base.iterdir()
        if file.is_file() and file.name.startswith(("LICENSE", "LICENCE"))
    )
    card = base / CARD
    if card.is_file():
        try:
            found = metadata_load(card) or {}
        except Exception:  # any YAML error: a card that cannot be read says nothing
            found = {}
        fields = {key: found[key] for key in _LICENCE_KEYS if isinstance(found.get(key), str)}
        if fields:
            return Licence(fields, "the base's model card")
    if files:
        named = {"license": "other", "license_name": "as-the-base", "license_link": files[0]}
        return Licence(named, f"the base's {files[0]}")
    return Licence({}, "")


def base_name(base: Path, adapter: Path, given: str | None = None) -> str | None:
    """`org/name` of the base: as given, as the adapter's config names it, or by the cache it lies in."""
    if given:
        return given
    try:
        named = json.loads((adapter / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        named = None
    if isinstance(named, str) and _NAME.fullmatch(named) and not Path(named).exists():
        return named
    origin = origin_of(base)
    return origin.repository if origin else None


def evaluations(merged: ValidationResult, tasks: TaskResult | None) -> list[EvalResult]:
    """The merged model's figures, each with the set it was measured on."""
    found = _results("all examples", "lorasmith-test-set", merged.overall, merged)
    for name, metrics in merged.groups.get("source", {}).items():
        found += _results(name, dataset_id(name), metrics, merged)
    for metric in tasks.metrics if tasks else []:
        if metric.value is not None:
            about = {"scored": metric.scored, "unscored": metric.unscored, "method": metric.method}
            found.append(
                _result(metric.benchmark, dataset_id(metric.benchmark), merged, about).made(
                    metric.metric, metric.value, f"{metric.metric} ({metric.method})"
                )
            )
    return found


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
