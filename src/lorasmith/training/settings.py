"""What a caller of `train` may choose."""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.errors import UsageError


@dataclass(frozen=True)
class TrainSettings:
    """What decides the adapter, apart from base and data."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"
    learning_rate: float = 2e-4
    warmup: float = 0.1
    """Fraction of all steps over which the rate rises; it then falls as a cosine to a tenth."""
    epochs: float = 1.0
    batch_size: int = 4
    max_length: int = 1024
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    template: str = "auto"
    seed: int = 42

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        for name in ("rank", "alpha", "batch_size", "max_length", "learning_rate", "epochs"):
            if getattr(self, name) <= 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}", expected="above 0")
