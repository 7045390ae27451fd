"""Record of a draft model's training: where it comes from, how it was trained, what it can do."""

from __future__ import annotations

from typing import Any, ClassVar

from lorasmith.records.base import FileDigest, Finding, Part, Record


class GeneratorReport(Part):
    """The draft's generator on held-out rows."""

    rows: int
    tokens: int
    loss: float
    """Mean negative log-likelihood of the target's responses, in nats a token."""
    perplexity: float
    kl: float | None = None
    """Mean KL(target ‖ draft) over the stored tokens and the rest as one; None without stored ones."""
    agreement: float | None = None
    """Share of places where the draft's likeliest token is the target's: greedy drafts are accepted there."""


class ClassifierReport(Part):
    """The difficulty classifier on held-out rows, beside always saying the most common label."""

    rows: int
    labels: list[str]
    labels_from: str
    """`data` (the rows' own), or `confidence` (the target's mean log-probability, cut at its median)."""
    accuracy: float
    f1: float
    """Mean of the labels' F1 (macro)."""
    f1_by_label: dict[str, float]
    calibration_error: float
    """Expected calibration error over ten bins of confidence."""
    confusion: list[list[int]]
    """Rows: true label, columns: predicted, in the order of `labels`."""
    majority_label: str
    majority_accuracy: float
    majority_f1: float


class DraftStep(Part):
    """One validation during training."""

    step: int
    loss: float
    """Weighted sum, as it is trained on."""


class DraftRecord(Record):
    """`lorasmith_draft.json` in the draft's folder."""

    FORMAT: ClassVar[str] = "lorasmith/draft/1"

    lorasmith_version: str
    target_sha256: str
    base_sha256: str | None = None
    """Of the small base; None for a draft that was cut from the target."""
    layers: list[int] | None = None
    """Of the target, where the draft was cut from it."""
    responses: FileDigest
    logprobs: FileDigest | None = None
    """The stored probabilities beside the responses."""
    settings: dict[str, Any]
    parameters: int
    target_parameters: int
    vocabulary: int
    """Rows of the embedding, as many as the target's."""
    padded_rows: int = 0
    """Rows that were added (or, below 0, taken away) so that both vocabularies have one size."""
    train_rows: int
    validation_rows: int
    held_out_rows: int
    steps: int
    """That were trained."""
    best_step: int
    """Whose weights are saved."""
    stopped_early: bool
    losses: list[float]
    """Weighted loss of each step."""
    validations: list[DraftStep]
    before: GeneratorReport
    """On the held-out rows, before any training."""
    generator: GeneratorReport
    classifier: ClassifierReport | None = None
    files: list[FileDigest] = []
    findings: list[Finding] = []
