"""Whether all records of a run speak of the same inputs: those of `run.json`, and one merged model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lorasmith.records.base import Finding, Record
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, WeightProof
from lorasmith.records.release import RunRecord, StageRecord
from lorasmith.records.scoring import ModelIdentity, TaskResult, ValidationResult

_INPUTS = ("base", "adapter")
_STAGES = ("merge", "prove-weights", "compare", "card")
"""Stages whose inputs of these names are the models; elsewhere they may be tables, or a draft's own base."""


def contradictions(
    run: RunRecord, records: Mapping[str, Record], stages: Iterable[StageRecord] = ()
) -> list[Finding]:
    """An error for each record (file → record) or stage that was made from something else than the others.

    An input that is replaced while a run works leaves such records behind: each is right by itself.
    """
    claims = [(path, sources(record)) for path, record in records.items()]
    claims += [(f"stages/{stage.stage}.json", stage.inputs) for stage in stages if stage.stage in _STAGES]
    findings = [
        _contradiction(path, name, "run.json", run.inputs[name], claimed[name])
        for path, claimed in claims
        for name in _INPUTS
        if name in claimed and name in run.inputs and claimed[name] != run.inputs[name]
    ]
    merged = [(path, claimed["merged"]) for path, claimed in claims if "merged" in claimed]
    findings += [
        _contradiction(path, "merged model", merged[0][0], merged[0][1], digest)
        for path, digest in merged[1:]
        if digest != merged[0][1]
    ]
    return findings


def sources(record: Record) -> dict[str, str]:
    """What a record says it was made from: `base`, `adapter`, `merged` → digest."""
    if isinstance(record, MergeRecord):
        return {"base": record.base_sha256, **_only(record.adapter_sha256)}
    if isinstance(record, WeightProof):
        merged = {"merged": record.merged_sha256}
        return {"base": record.base_sha256, **_only(record.adapter_sha256), **merged}
    if isinstance(record, ValidationResult | TaskResult):
        return _scored(record.model)
    if isinstance(record, BehaviourProof):
        return {**_scored(record.a), **_scored(record.b)}
    return {}


def _only(adapters: list[str]) -> dict[str, str]:
    """The adapter of a run; a merge of several is none of a run's."""
    return {"adapter": adapters[0]} if len(adapters) == 1 else {}


def _scored(model: ModelIdentity) -> dict[str, str]:
    if model.role == "merged":
        return {"merged": model.model_sha256}
    return {
        "base": model.model_sha256,
        **({"adapter": model.adapter_sha256} if model.adapter_sha256 is not None else {}),
    }


def _contradiction(path: str, what: str, other: str, expected: str, digest: str) -> Finding:
    return Finding(
        severity="error",
        code="other-input",
        message=f"{path} is about another {what} than {other}",
        where=path,
        expected=f"SHA-256 {expected}, found {digest}",
        remedy="leave base and adapter as they are while a run works, and give its command again",
    )
