"""Token-weighted means over examples, with bootstrap intervals.

Tokens of one example are not independent, examples are; so examples are drawn, each with all its tokens. The
same examples and the same seed give the same interval, whichever group they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.models.scoring import token_logprobs
from lorasmith.records.base import Interval
from lorasmith.records.dataset import Example

Array = npt.NDArray[np.float64]

DRAWS = 2000
"""Bootstrap draws: the ends of a 95 % interval then rest on 50 draws each side."""
LEVEL = 0.95
"""What share of the draws an interval holds."""

_LARGEST_EXPONENT = 700.0
"""e^700 is the end of what a double holds; a mean loss beyond it says no more than the loss itself does."""

_DIMENSIONS = ("source", "domain", "difficulty")


def perplexity(loss: float) -> float:
    """exp(loss), capped at e^700 so that it stays a number."""
    return math.exp(min(loss, _LARGEST_EXPONENT))


def group_rows(metadata: Sequence[Mapping[str, str]]) -> dict[str, dict[str, list[int]]]:
    """Row indices by `source`, `domain`, `difficulty` and their crossings (`source × difficulty` → `a / b`).

    Groups stand in the order of their names.
    """
    crossings = [(a, b) for i, a in enumerate(_DIMENSIONS) for b in _DIMENSIONS[i + 1 :]]
    keys = [(name,) for name in _DIMENSIONS] + crossings
    grouped: dict[str, dict[str, list[int]]] = {}
    for key in keys:
        members: dict[str, list[int]] = {}
        for index, row in enumerate(metadata):
            members.setdefault(" / ".join(row[name] for name in key), []).append(index)
        grouped[" × ".join(key)] = dict(sorted(members.items()))
    return grouped


def group_fields(example: Example) -> dict[str, str]:
    """What `group_rows` needs of an example."""
    return {name: str(getattr(example.metadata, name)) for name in _DIMENSIONS}


def resamples(count: int, seed: int) -> Iterator[Array]:
    """How often each of `count` examples is drawn, [≤ DRAWS, count] at a time, in blocks of about 32 MB."""
    generator = np.random.default_rng(seed)
    block = max(1, min(DRAWS, 4_000_000 // count))
    done = 0
    while done < DRAWS:
        size = min(block, DRAWS - done)
        yield generator.multinomial(count, np.full(count, 1.0 / count), size=size).astype(np.float64)
        done += size


def bootstrap(statistic: Callable[[Array], Array], count: int, seed: int) -> Interval | None:
    """Percentile interval of `statistic`, mapping draw counts [D, count] to [D]; None below two examples."""
    if count < 2:
        return None
    values = np.concatenate([statistic(block) for block in resamples(count, seed)])
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(low=float(low), high=float(high), level=LEVEL)


def mean_interval(sums: Array, counts: Array, seed: int) -> Interval | None:
    """Interval of Σ sums / Σ counts over examples: the token-weighted mean."""
    return bootstrap(lambda drawn: (drawn @ sums) / (drawn @ counts), len(sums), seed)


def clustered_error(sums: Array, counts: Array) -> float | None:
    """Standard error of Σ sums / Σ counts with examples as clusters of tokens (linearised ratio estimator).

    sqrt(m/(m−1) · Σᵢ (sᵢ − r·nᵢ)²) / Σ nᵢ for m examples with sums sᵢ over nᵢ tokens and ratio r. None for
    one example: it does not tell.
    """
    m = len(sums)
    if m < 2:
        return None
    residual = sums - sums.sum() / counts.sum() * counts
    return float(np.sqrt(m / (m - 1) * np.sum(residual**2)) / counts.sum())


def sign_flip_p(differences: Array, seed: int, draws: int = DRAWS) -> float:
    """Two-sided p of the mean difference being 0, by flipping the signs of examples at random.

    (1 + draws at least as extreme) / (1 + draws), so never 0 (Phipson and Smyth, 2010). With n examples it
    cannot fall below 2^(1−n), however large the effect: few examples stay unconvincing.
    """
    generator = np.random.default_rng(seed)
    observed = abs(float(differences.sum()))
    slack = 1e-12 * float(np.abs(differences).sum())
    extreme, done = 0, 0
    block = max(1, min(draws, 4_000_000 // len(differences)))
    while done < draws:
        size = min(block, draws - done)
        signs = generator.integers(0, 2, size=(size, len(differences)), dtype=np.int8) * 2.0 - 1.0
        extreme += int(np.count_nonzero(np.abs(signs @ differences) >= observed - slack))
        done += size
    return (1 + extreme) / (1 + draws)


# Two models on the same tokens: divergence over the full vocabulary, choices, probabilities.
#
# Everything is computed from the logits of a few hundred positions at a time and only numbers per token are
# kept.


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
