"""Train a draft model on the target's responses: a generator to speculate with, a difficulty classifier."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lorasmith
from lorasmith.errors import CheckpointError, UsageError
from lorasmith.files.digests import describe, digest_folder
from lorasmith.files.hub import local_model
from lorasmith.files.lock import only_one
from lorasmith.files.machine import require_disk
from lorasmith.files.paths import StrPath
from lorasmith.files.place import require_own_place
from lorasmith.followup.draft_base import (
    Draft,
    cut_from_target,
    from_base,
    require_layers,
    require_same_tokenizer,
)
from lorasmith.followup.draft_identity import digest_logprobs, inputs_of, key_of
from lorasmith.followup.draft_labels import Split, label_rows, split_rows
from lorasmith.followup.draft_report import classify, report_classifier, report_generator
from lorasmith.followup.draft_rows import DraftRow, logprobs_beside, read_responses, record_beside
from lorasmith.followup.draft_save import RECORD, round_to_saved, save_draft
from lorasmith.followup.draft_settings import DraftSettings
from lorasmith.followup.draft_train import Trainer
from lorasmith.models.arithmetic import resolve_device
from lorasmith.models.load import load_tokenizer, quiet_libraries
from lorasmith.models.unpack import unpacking
from lorasmith.progress import Progress, silent
from lorasmith.records.base import Finding
from lorasmith.records.draft import ClassifierReport, DraftRecord


def train_draft(
    target: StrPath,
    responses: StrPath,
    output: StrPath,
    *,
    base: StrPath | None = None,
    layers: Sequence[int] | None = None,
    settings: DraftSettings | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> DraftRecord:
    """Train a draft of `target` on its responses and write it to `output` as a transformers folder.

    The draft begins as `base` (a folder or a name on the hub) or as the target's own `layers`. A killed
    training continues from its last checkpoint, beside the output, and ends with the same weights. Raises
    `UsageError` for settings that do not go together, layers that do not exist and an output that is not ours
    to replace, `CheckpointError` for a base with another tokenizer and a damaged checkpoint, `DataError` for
    responses that cannot be used, `BusyError` while another training writes to `output`.
    """
    target, responses, output = local_model(target, progress=progress), Path(responses), Path(output)
    chosen = settings or DraftSettings()
    chosen.check()
    if (base is None) == (layers is None):
        raise UsageError(
            "a draft begins as a small base or as layers of the target",
            remedy="give either --base DIR or --from-target --layers 0,2,4",
        )
    small = None if base is None else local_model(base, progress=progress)
    for folder in (target, small):
        if folder is not None and unpacking(folder):
            raise CheckpointError(
                "the model is compressed", where=folder, remedy="give the one that it was compressed from"
            )
    require_own_place(output, RECORD, [target, *([small] if small else [])])
    tokenizer = load_tokenizer(target)
    if small is None:
        require_layers(target, layers or ())
    else:
        require_same_tokenizer(load_tokenizer(small), tokenizer, small, target)
    with only_one(output, "training"):
        return _train(target, responses, output, small, layers, tokenizer, chosen, device, progress)


def _train(
    target: Path,
    responses: Path,
    output: Path,
    small: Path | None,
    layers: Sequence[int] | None,
    tokenizer: Any,
    chosen: DraftSettings,
    device: str,
    progress: Progress,
) -> DraftRecord:
    rows, told = read_responses(responses, tokenizer, max_length=chosen.max_length)
    split = split_rows(len(rows), validation=chosen.validation, held_out=chosen.held_out, seed=chosen.seed)
    rows, labels, labels_from = label_rows(rows, split.train, chosen.labels)
    findings = [*told, *_origin(target, responses), *_findings(rows, labels, chosen, responses)]
    place = resolve_device(device)
    with quiet_libraries():
        if small is not None:
            draft = from_base(small, target, place)
        else:
            draft = cut_from_target(target, layers or (), place)
    _check_length(rows, draft, responses)
    inputs = inputs_of(target, small, responses)
    checkpoint = output.with_name(f".{output.name}.checkpoint")
    parameters = sum(parameter.numel() for parameter in draft.model.parameters())
    # Weights, best weights and two moments in float32, twice while a checkpoint replaces the last one.
    require_disk(output.parent, 32 * parameters, "train the draft")
    held = [rows[index] for index in split.held_out]
    before = report_generator(draft.model, held, place)
    head = _new_head(draft, labels, place)
    key = key_of(inputs, chosen, list(layers or ()), place.type)
    trainer = Trainer(draft.model, head, rows, split, chosen, checkpoint, key)
    course = trainer.run(progress)
    round_to_saved(draft, head)
    record = DraftRecord(
        lorasmith_version=lorasmith.__version__,
        target_sha256=inputs["target"],
        base_sha256=inputs.get("base"),
        layers=draft.layers,
        responses=describe([responses], responses.parent)[0],
        logprobs=digest_logprobs(responses),
        settings=asdict(chosen),
        parameters=parameters,
        target_parameters=draft.target_parameters,
        vocabulary=draft.model.get_input_embeddings().weight.shape[0],
        padded_rows=draft.padded_rows,
        train_rows=len(split.train),
        validation_rows=len(split.validation),
        held_out_rows=len(split.held_out),
        steps=course.step,
        best_step=course.best_step,
        stopped_early=course.stopped_early,
        losses=course.losses,
        validations=course.validations,
        before=before,
        generator=report_generator(draft.model, held, place),
        classifier=_classifier(draft, head, rows, split, labels, labels_from, place),
        findings=findings,
    )
    record = save_draft(draft, head, labels, record, output)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return record


def _origin(target: Path, responses: Path) -> list[Finding]:
    """Whether the responses are this target's own."""
    made_by = record_beside(responses)
    if made_by is None or made_by.settings.model_sha256 == digest_folder(target):
        return []
    return [
        Finding(
            severity="warning",
            code="other-target",
            message="the responses are those of another model: the draft will imitate that one",
            where=responses.name,
            remedy="extract responses from the target itself",
        )
    ]


def _findings(
    rows: Sequence[DraftRow], labels: Sequence[str], chosen: DraftSettings, responses: Path
) -> list[Finding]:
    """What the responses lack."""
    found = []
    if any(row.top_ids is None for row in rows):
        if chosen.cross_entropy_weight == 0:
            raise UsageError(
                "there is nothing to learn from: no stored probabilities, and no weight on cross-entropy",
                where=logprobs_beside(responses),
                remedy="extract the responses with --top-logprobs, or raise --cross-entropy-weight",
            )
        found.append(
            Finding(
                severity="warning",
                code="no-logprobs",
                message="not all responses have stored probabilities: the draft learns from the tokens alone",
                where=responses.name,
                remedy="extract the responses with --top-logprobs 8 for a closer draft",
            )
        )
    if not labels:
        found.append(
            Finding(
                severity="note",
                code="no-labels",
                message="the rows have no difficulty: no classifier was trained",
                where=responses.name,
                remedy="give rows with metadata.difficulty, or extract them with --top-logprobs",
            )
        )
    return found


def _check_length(rows: Sequence[DraftRow], draft: Draft, responses: Path) -> None:
    longest = max(len(row.ids) for row in rows)
    if draft.context is not None and longest > draft.context:
        raise UsageError(
            f"a row has {longest:,} tokens, the draft was made for {draft.context:,}",
            where=responses,
            remedy=f"give --max-length {draft.context}",
        )


def _new_head(draft: Draft, labels: Sequence[str], device: torch.device) -> torch.nn.Linear | None:
    if not labels:
        return None
    head = torch.nn.Linear(draft.model.get_input_embeddings().weight.shape[1], len(labels), device=device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def _classifier(
    draft: Draft,
    head: torch.nn.Linear | None,
    rows: Sequence[DraftRow],
    split: Split,
    labels: Sequence[str],
    labels_from: str,
    device: torch.device,
) -> ClassifierReport | None:
    held = [rows[index] for index in split.held_out if rows[index].label >= 0]
    if head is None or not held:
        return None
    counts = Counter(rows[index].label for index in split.train if rows[index].label >= 0)
    majority = max(sorted(counts), key=lambda label: counts[label])
    found = classify(draft.model, head, held, device)
    return report_classifier(found, [row.label for row in held], labels, labels_from, majority)
