"""Record of a training run."""

from __future__ import annotations

from typing import Any, ClassVar

from lorasmith.records.base import FileDigest, Record


class TrainRecord(Record):
    """`lorasmith_train.json` in the adapter folder."""

    FORMAT: ClassVar[str] = "lorasmith/train/1"

    lorasmith_version: str
    base_sha256: str
    train: FileDigest
    settings: dict[str, Any]
    template: str
    examples: int
    tokens: int
    """Response tokens that were trained on, over all epochs."""
    truncated: int
    """Rows cut at `max_length`."""
    trainable_parameters: int
    losses: list[float]
    """Mean loss per response token of each step, in nats."""
