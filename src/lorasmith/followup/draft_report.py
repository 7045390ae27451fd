"""What the draft can do on rows it has not seen: its generator against the target, and its classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.followup.draft_loss import forward, stored, topk_kl
from lorasmith.followup.draft_rows import DraftRow
from lorasmith.models.loglik import token_logprobs
from lorasmith.models.statistics import perplexity
from lorasmith.records.draft import ClassifierReport, GeneratorReport

_BINS = 10
"""Of confidence, for the calibration error (Guo et al., 2017)."""


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
    found = []
    with torch.no_grad():
        for row in rows:
            found.append(head(forward(model, [row], device).prompt).double().softmax(-1)[0].cpu().numpy())
    return np.array(found)


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
