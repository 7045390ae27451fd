"""Train a draft model on the target's responses: a generator to speculate with, a difficulty classifier."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

import lorasmith
from lorasmith.errors import CheckpointError, UsageError
from lorasmith.files.atomic import StrPath, aside, publish_folder, write_bytes, write_record
from lorasmith.files.digests import describe, digest_folder, folder_files
from lorasmith.files.output_folder import only_one, require_own_place
from lorasmith.followup.drafts.loss import forward, stored, topk_kl
from lorasmith.followup.drafts.rows import (
    DraftRow,
    Split,
    label_rows,
    logprobs_beside,
    read_responses,
    record_beside,
    split_rows,
)
from lorasmith.followup.drafts.start import (
    Draft,
    cut_from_target,
    from_base,
    require_layers,
    require_same_tokenizer,
)
from lorasmith.followup.drafts.trainer import Trainer
from lorasmith.hub.models import local_model
from lorasmith.machine.resources import require_disk
from lorasmith.models.device import resolve_device
from lorasmith.models.load import load_tokenizer, quiet_libraries, unpacking
from lorasmith.models.scoring import token_logprobs
from lorasmith.models.statistics import perplexity
from lorasmith.options import DraftOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.followup import ClassifierReport, DraftRecord, GeneratorReport

# What decides the weights of a draft: digests of all that is read, and one key over everything.


def inputs_of(target: Path, base: Path | None, responses: Path) -> dict[str, str]:
    """SHA-256 of everything that is read."""
    digests = {
        "target": digest_folder(target),
        "responses": describe([responses], responses.parent)[0].sha256,
    }
    if base is not None:
        digests["base"] = digest_folder(base)
    logprobs = digest_logprobs(responses)
    if logprobs is not None:
        digests["logprobs"] = logprobs.sha256
    return digests


def digest_logprobs(responses: Path) -> FileDigest | None:
    """Digest of the stored probabilities beside the responses; None where there are none."""
    path = logprobs_beside(responses)
    return describe([path], path.parent)[0] if path.is_file() else None


def key_of(inputs: dict[str, str], options: DraftOptions, layers: list[int], device: str) -> str:
    """Names everything that decides the weights: a checkpoint under another key is not continued."""
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    versions["lorasmith"] = lorasmith.__version__
    body = [inputs, options.model_dump(exclude={"device"}), layers, device, versions]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# What the draft can do on rows it has not seen: its generator against the target, and its classifier.


_BINS = 10
"""Bins of confidence for the calibration error (Guo et al., 2017)."""


def report_generator(model: Any, rows: Sequence[DraftRow], device: torch.device) -> GeneratorReport:
    """Loss, KL to the stored probabilities and agreement, over all response tokens; sums in float64."""
    loss = kl = 0.0
    same = tokens = 0
    compared = all(row.top_ids is not None for row in rows)
    model.eval()
    with torch.no_grad():
        for row in rows:
            out = forward(model, [row], device)
            loss -= float(token_logprobs(out.logits, out.targets).double().sum())
            tokens += len(out.targets)
            tops = stored([row], device)
            if compared and tops is not None:
                kl += float(topk_kl(out.logits, *tops).double().sum())
                same += int((out.logits.argmax(-1) == tops[0][:, 0]).sum())
    return GeneratorReport(
        rows=len(rows),
        tokens=tokens,
        loss=loss / tokens,
        perplexity=perplexity(loss / tokens),
        kl=kl / tokens if compared else None,
        agreement=same / tokens if compared else None,
    )


def classify(
    model: Any, head: torch.nn.Linear, rows: Sequence[DraftRow], device: torch.device
) -> npt.NDArray[np.float64]:
    """[rows, labels] probabilities."""
    model.eval()
    probabilities = []
    with torch.no_grad():
        for row in rows:
            probabilities.append(
                head(forward(model, [row], device).prompt).double().softmax(-1)[0].cpu().numpy()
            )
    return np.array(probabilities)


def report_classifier(
    probabilities: npt.NDArray[np.float64],
    truth: Sequence[int],
    labels: Sequence[str],
    labels_from: str,
    majority: int,
) -> ClassifierReport:
    """Figures from [n, C] probabilities and the n true labels; `majority` is the training rows' commonest."""
    true = np.array(truth)
    predicted = probabilities.argmax(-1)
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(confusion, (true, predicted), 1)
    always = np.zeros_like(confusion)
    np.add.at(always, (true, np.full(len(true), majority)), 1)
    scores, baseline = f1_scores(confusion), f1_scores(always)
    return ClassifierReport(
        rows=len(true),
        labels=list(labels),
        labels_from=labels_from,
        accuracy=float((predicted == true).mean()),
        f1=float(scores.mean()),
        f1_by_label={name: float(score) for name, score in zip(labels, scores, strict=True)},
        calibration_error=calibration_error(probabilities.max(-1), predicted == true),
        confusion=confusion.tolist(),
        majority_label=labels[majority],
        majority_accuracy=float((true == majority).mean()),
        majority_f1=float(baseline.mean()),
    )


def f1_scores(confusion: npt.NDArray[np.int_]) -> npt.NDArray[np.float64]:
    """[C] F1 of each label, 2·TP / (2·TP + FP + FN); 0 for one that is neither there nor predicted."""
    hits = np.diag(confusion).astype(float)
    either = confusion.sum(0) + confusion.sum(1)
    return np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)


def calibration_error(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> float:
    """Mean |accuracy − confidence| over ten equal bins of confidence, weighted by their rows."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        np.count_nonzero(bins == place) * abs(right[bins == place].mean() - confidence[bins == place].mean())
        for place in np.unique(bins)
    ]
    return float(sum(gaps) / len(confidence))


# A draft on disk: a plain transformers folder, the small head beside it, and the record.


RECORD = "lorasmith_draft.json"
HEAD = "difficulty_head"
"""`difficulty_head.safetensors` holds `weight` [C, H] and `bias` [C]; `difficulty_head.json` says how to use
them: softmax(weight · h + bias), h being the final hidden state at the last token of the prompt."""


def round_to_saved(draft: Draft, head: torch.nn.Linear | None) -> None:
    """Round the weights to the type that they are saved in, so that the report is on what is saved."""
    dtype = getattr(draft.model.config, "dtype", None)
    saved = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    draft.model.to(saved).to(torch.float32)
    draft.model.config.dtype = saved


def save_draft(
    draft: Draft, head: torch.nn.Linear | None, labels: Sequence[str], record: DraftRecord, output: Path
) -> DraftRecord:
    """Write the folder aside and rename it; returns the record with the files' digests."""
    temporary = aside(output)
    shutil.rmtree(temporary, ignore_errors=True)
    with quiet_libraries():
        draft.model.to(draft.model.config.dtype).save_pretrained(temporary)
        draft.tokenizer.save_pretrained(temporary)
    if head is not None:
        tensors = {"weight": head.weight.detach().cpu(), "bias": head.bias.detach().cpu()}
        save_file(tensors, temporary / f"{HEAD}.safetensors")
        write_bytes(temporary / f"{HEAD}.json", _head_config(labels, tensors["weight"]))
    files = describe(folder_files(temporary), temporary)
    record = record.model_copy(update={"files": files})
    write_record(temporary / RECORD, record)
    publish_folder(temporary, output)
    return record


def _head_config(labels: Sequence[str], weight: torch.Tensor) -> bytes:
    body: dict[str, Any] = {
        "format": "lorasmith/difficulty-head/1",
        "labels": list(labels),
        "hidden_size": weight.shape[1],
        "input": "final hidden state (what the output head gets) at the last token of the prompt",
        "output": "softmax(weight @ h + bias), in the order of labels",
    }
    return (json.dumps(body, indent=2) + "\n").encode()


@documented(DraftOptions)
def train_draft(
    target: StrPath,
    responses: StrPath,
    output: StrPath,
    *,
    from_model: StrPath | None = None,
    layers: Sequence[int] | None = None,
    options: DraftOptions | None = None,
    progress: Progress = silent,
    **given: Any,
) -> DraftRecord:
    """Train a draft of `target` on its responses and write it to `output` as a transformers folder.

    The draft begins as `from_model` (a folder or a name on the hub) or as the target's own `layers`. A killed
    training continues from its last checkpoint, beside the output, and ends with the same weights. Raises
    `UsageError` for options that do not go together, layers that do not exist and an output that is not ours
    to replace, `CheckpointError` for a model with another tokenizer and a damaged checkpoint, `DataError` for
    responses that cannot be used, `BusyError` while another training writes to `output`.
    """
    target, responses, output = local_model(target, progress=progress), Path(responses), Path(output)
    chosen = DraftOptions.given(options, given)
    if (from_model is None) == (layers is None):
        raise UsageError(
            "a draft begins as a small model or as layers of the target",
            remedy="give either --from-model DIR or --from-target --layers 0,2,4",
        )
    small = None if from_model is None else local_model(from_model, progress=progress)
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
        return _train(target, responses, output, small, layers, tokenizer, chosen, progress)


def _train(
    target: Path,
    responses: Path,
    output: Path,
    small: Path | None,
    layers: Sequence[int] | None,
    tokenizer: Any,
    chosen: DraftOptions,
    progress: Progress,
) -> DraftRecord:
    rows, told = read_responses(responses, tokenizer, max_length=chosen.max_length)
    split = split_rows(len(rows), validation=chosen.validation, held_out=chosen.held_out, seed=chosen.seed)
    rows, labels, labels_from = label_rows(rows, split.train, chosen.labels)
    findings = [*told, *_origin(target, responses), *_findings(rows, labels, chosen, responses)]
    place = resolve_device(chosen.device)
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
        settings=chosen.model_dump(exclude={"device"}),
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
    rows: Sequence[DraftRow], labels: Sequence[str], chosen: DraftOptions, responses: Path
) -> list[Finding]:
    """Findings on what the responses lack for these settings."""
    findings = []
    if any(row.top_ids is None for row in rows):
        if chosen.cross_entropy_weight == 0:
            raise UsageError(
                "there is nothing to learn from: no stored probabilities, and no weight on cross-entropy",
                where=logprobs_beside(responses),
                remedy="extract the responses with --top-logprobs, or raise --cross-entropy-weight",
            )
        findings.append(
            Finding(
                severity="warning",
                code="no-logprobs",
                message="not all responses have stored probabilities: the draft learns from the tokens alone",
                where=responses.name,
                remedy="extract the responses with --top-logprobs 8 for a closer draft",
            )
        )
    if not labels:
        findings.append(
            Finding(
                severity="note",
                code="no-labels",
                message="the rows have no difficulty: no classifier was trained",
                where=responses.name,
                remedy="give rows with metadata.difficulty, or extract them with --top-logprobs",
            )
        )
    return findings


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
    probabilities = classify(draft.model, head, held, device)
    return report_classifier(probabilities, [row.label for row in held], labels, labels_from, majority)
