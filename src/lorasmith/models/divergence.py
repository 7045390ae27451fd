"""Two models on the same tokens: divergence over the full vocabulary, choices, probabilities.

Everything is computed from the logits of a few hundred positions at a time and only numbers per token are
kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.models.loglik import token_logprobs

_SERIES_BELOW = 0.03
"""Where e^−d − 1 + d is taken from its series: by subtraction it would lose its digits in float32. With four
terms the series is off by d⁴/360 of the value, below 3e-9 here."""


@dataclass(frozen=True)
class TokenPairs:
    """What two models make of each scored token: arrays over N tokens."""

    logprob_a: npt.NDArray[np.float32]
    logprob_b: npt.NDArray[np.float32]
    kl: npt.NDArray[np.float32]
    """KL(A ‖ B) in nats, never negative."""
    top_a: npt.NDArray[np.int64]
    """A's most probable token."""
    top_b: npt.NDArray[np.int64]
    margin: npt.NDArray[np.float32]
    """log p_A(top_a) − log p_A(top_b): 0 where both choose the same token."""

    def __len__(self) -> int:
        return len(self.kl)

    def arrays(self) -> list[Any]:
        """The arrays in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def part(self, where: Any) -> TokenPairs:
        """The tokens of a slice or an index array."""
        return TokenPairs(*(array[where] for array in self.arrays()))

    @staticmethod
    def join(parts: Iterable[TokenPairs]) -> TokenPairs:
        """One after the other."""
        parts = list(parts)
        return TokenPairs(
            *(np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(TokenPairs))
        )


def kl_divergence(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    """[n] KL(A ‖ B) in nats from two [n, V] tensors of logits.

    With d = (a − b) − Σ p_A (a − b), the divergence is log Σ p_A e^−d = log(1 + Σ p_A (e^−d − 1 + d)). All
    terms of that sum are positive, so two nearly equal models do not drown in the rounding of their
    log-sum-exps, as they do in Σ p (log p − log q): at a true KL of 1e-12 that form gives ±1e-7 in float32.
    """
    p = torch.softmax(logits_a, -1)
    d = logits_a - logits_b
    d -= (p * d).sum(-1, keepdim=True)
    series = d * d * (0.5 - d * (1 / 6 - d / 24))
    terms = torch.where(d.abs() < _SERIES_BELOW, series, torch.expm1(-d) + d)
    return torch.log1p((p * terms).sum(-1))


def compare_logits(logits_a: torch.Tensor, logits_b: torch.Tensor, targets: torch.Tensor) -> TokenPairs:
    """Numbers per token from two [n, V] float32 tensors and the [n] correct tokens."""
    top_a, top_b = logits_a.argmax(-1), logits_b.argmax(-1)
    margin = logits_a.gather(-1, top_a[:, None]) - logits_a.gather(-1, top_b[:, None])
    return TokenPairs(
        logprob_a=_numpy(token_logprobs(logits_a, targets)),
        logprob_b=_numpy(token_logprobs(logits_b, targets)),
        kl=_numpy(kl_divergence(logits_a, logits_b)),
        top_a=_numpy(top_a),
        top_b=_numpy(top_b),
        margin=_numpy(margin[:, 0]),
    )


def _numpy(values: torch.Tensor) -> Any:
    return values.cpu().numpy()
