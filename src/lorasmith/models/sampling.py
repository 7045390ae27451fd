"""Choosing the next token: the likeliest, or one drawn such that a row's neighbours do not matter.

Each row has a random stream of its own, fixed by its seed: one uniform number a token, looked up in the
cumulative distribution. Temperature, then top-k, then top-p, in the order of Holtzman et al. 2020
(arXiv:1904.09751) as generation libraries apply them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorasmith.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; a temperature of 0 takes the likeliest (greedy)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 for no limit."""
    seed: int = 0
    """Of everything random; not used by greedy decoding."""

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be, or that greedy decoding would ignore."""
        for name, good, expected in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
        ):
            if not good:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}", expected=expected)
        if not self.temperature and (self.top_p != 1 or self.top_k):
            raise UsageError(
                "--top-p and --top-k do nothing at a temperature of 0",
                remedy="give --temperature as well, or leave them out",
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0


def stream(seed: int) -> np.random.Generator:
    """The random numbers of one row."""
    return np.random.Generator(np.random.Philox(key=seed))


def choose(
    logits: torch.Tensor, sampling: Sampling, streams: Sequence[np.random.Generator | None]
) -> torch.Tensor:
    """The next token of each row, `[N]`, from float logits `[N, V]`; `streams` are those of the rows."""
    if sampling.greedy:
        return logits.argmax(-1)
    draws = torch.tensor([row.random() for row in streams if row is not None], dtype=torch.float64)
    ordered, tokens = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered, tokens = ordered[:, : sampling.top_k], tokens[:, : sampling.top_k]
    chances = ordered.softmax(-1)
    before = chances.cumsum(-1) - chances
    chances = chances * (before < sampling.top_p)  # the likeliest always stays: nothing stands before it
    reached = chances.cumsum(-1)
    place = torch.searchsorted(reached, (draws.to(reached.device) * reached[:, -1])[:, None], right=True)
    return tokens.gather(-1, place.clamp(max=tokens.shape[-1] - 1))[:, 0]
