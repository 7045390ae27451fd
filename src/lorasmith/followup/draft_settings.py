"""What decides a draft, apart from its base, the target and the responses."""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.errors import UsageError
from lorasmith.followup.draft_loss import Weights


@dataclass(frozen=True)
class DraftSettings:
    """The settings of one training."""

    learning_rate: float = 1e-4
    warmup: float = 0.05
    """Fraction of all steps over which the rate rises; it then falls as a cosine to a tenth."""
    epochs: float = 3.0
    batch_size: int = 8
    max_length: int = 1024
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    cross_entropy_weight: float = 1.0
    kl_weight: float = 1.0
    classifier_weight: float = 0.1
    labels: str = "auto"
    validation: float = 0.1
    held_out: float = 0.1
    validate_every: int = 50
    """Steps between two validations; each writes a checkpoint."""
    patience: int = 3
    """Validations without a better one after which training stops."""
    seed: int = 42

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        for name in ("learning_rate", "epochs", "batch_size", "max_length", "validate_every", "patience"):
            if getattr(self, name) <= 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}", expected="above 0")
        parts = (self.cross_entropy_weight, self.kl_weight, self.classifier_weight)
        if min(parts) < 0 or self.cross_entropy_weight + self.kl_weight == 0:
            raise UsageError(
                f"the weights of the loss are {parts}",
                expected="none below 0, and cross-entropy or KL above it",
            )

    @property
    def weights(self) -> Weights:
        """Of the parts of the loss."""
        return Weights(self.cross_entropy_weight, self.kl_weight, self.classifier_weight)
