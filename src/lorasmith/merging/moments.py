"""Second moments of what linear layers get: Σ x·xᵀ over the tokens of all calibration rows, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

_TOGETHER = 2_048
"""Tokens whose products are summed in float32 before they join the float64 total."""


@dataclass
class Moments:
    """Σ x·xᵀ of the layers that share an input of I numbers."""

    paths: list[str]
    total: torch.Tensor
    """[I, I] float64; complete once `settle` was called."""
    tokens: int = 0
    waiting: list[torch.Tensor] = field(default_factory=list)
    """Inputs [T, I] float32 that are not in `total` yet: one large product is cheaper than many small."""

    def take(self, inputs: torch.Tensor) -> None:
        """Add the inputs [T, I] of a row, sooner or later."""
        self.waiting.append(inputs)
        self.tokens += len(inputs)
        if sum(len(part) for part in self.waiting) >= _TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Bring everything that waits into `total`."""
        if self.waiting:
            rows = torch.cat(self.waiting)
            self.total += rows.T @ rows
            self.waiting.clear()
