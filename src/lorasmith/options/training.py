"""How an adapter is trained."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from lorasmith.options.base import Options
from lorasmith.options.machine import DeviceOptions, SeedOptions
from lorasmith.options.scoring import ScoredOptions
from lorasmith.options.values import Count, Fraction

Positive = Annotated[float, Field(gt=0)]


class OptimiserOptions(Options):
    """What every training has in common."""

    PANEL: ClassVar[str] = "Training"

    warmup: Fraction = 0.1
    """Fraction of all steps over which the rate rises; it then falls as a cosine to a tenth."""
    max_length: Count = 1024
    """Longest row in tokens; longer ones are cut."""
    clip_norm: Positive = 1.0
    """Largest norm of the gradient; larger gradients are scaled down to it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of the weights, by AdamW."""


class TrainOptions(OptimiserOptions, ScoredOptions, DeviceOptions, SeedOptions):
    """What decides an adapter, apart from its base and its data."""

    PANEL: ClassVar[str] = "Training"

    rank: Count = 16
    """Rank of the adapter."""
    alpha: Count = 32
    """LoRA alpha: the update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Fraction of the adapter's inputs that are dropped at random."""
    target_modules: str = "all-linear"
    """Layers that get an adapter: all-linear, or names separated by commas."""
    learning_rate: Positive = 2e-4
    """Peak of the learning rate."""
    epochs: Positive = 1.0
    """Number of passes over the training file."""
    batch_size: Count = 4
    """Number of rows in a step."""
