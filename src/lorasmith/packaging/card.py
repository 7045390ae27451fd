"""The model card of the merged model: `README.md`, made from the records alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorasmith.files.atomic import read_record, write_bytes
from lorasmith.files.digests import CARD
from lorasmith.packaging.card_metadata import Licence, base_licence, base_name, evaluations
from lorasmith.packaging.card_text import body
from lorasmith.records.base import Record
from lorasmith.records.dataset import ContaminationRecord
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, ComparisonRecord, WeightProof
from lorasmith.records.release import GateRecord
from lorasmith.records.scoring import TaskResult, ValidationResult

R = TypeVar("R", bound=Record)
ROLES = ("base", "adapter", "merged")


@dataclass(frozen=True)
class CardRecords:
    """What the card tells of."""

    merge: MergeRecord
    validations: dict[str, ValidationResult]
    """By role; the merged model's is always there."""
    tasks: dict[str, TaskResult]
    weights: WeightProof | None
    behaviour: BehaviourProof | None
    comparison: ComparisonRecord | None
    contamination: ContaminationRecord | None
    gates: GateRecord | None


def write_card(
    run: Path, *, base: Path, adapter: Path, base_model: str | None = None, name: str | None = None
) -> None:
    """Write `merged/README.md` of a run, through huggingface_hub's card classes.

    `base_model` (`org/name`) is what the card links to; without it the adapter's config or the hub's cache
    tell. `name` is the model's in the index of figures. The licence is the base's. The card is a function of
    the records and of base and adapter: no times, no paths. Raises `InputError` for a record that is missing
    or damaged.
    """
    records = load_card_records(run)
    text = card_text(records, base_licence(base), base_name(base, adapter, base_model), name)
    write_bytes(run / "merged" / CARD, text.encode())


def card_text(records: CardRecords, licence: Licence, base_model: str | None, name: str | None) -> str:
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
    text = body(records, title=title, base_model=base_model, licence=licence)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def load_card_records(run: Path) -> CardRecords:
    """Everything that is there; merge and validation of the merged model must be."""
    validation, proof = run / "validation", run / "proof"
    validations = {role: _read(validation / f"{role}.json", ValidationResult) for role in ROLES}
    validations["merged"] = read_record(validation / "merged.json", ValidationResult)
    tasks = {role: _read(validation / f"{role}_tasks.json", TaskResult) for role in ROLES}
    return CardRecords(
        merge=read_record(run / "merged" / "lorasmith_merge.json", MergeRecord),
        validations={role: found for role, found in validations.items() if found},
        tasks={role: found for role, found in tasks.items() if found},
        weights=_read(proof / "weights.json", WeightProof),
        behaviour=_read(proof / "behaviour.json", BehaviourProof),
        comparison=_read(proof / "comparison.json", ComparisonRecord),
        contamination=_read(run / "testset" / "contamination.json", ContaminationRecord),
        gates=_read(run / "gates.json", GateRecord),
    )


def _read(path: Path, kind: type[R]) -> R | None:
    return read_record(path, kind) if path.is_file() else None
