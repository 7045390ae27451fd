"""Token-weighted means over examples, with bootstrap intervals.

Tokens of one example are not independent, examples are; so examples are drawn, each with all its tokens. The
same examples and the same seed give the same interval, whichever group they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

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
        found: dict[str, list[int]] = {}
        for index, row in enumerate(metadata):
            found.setdefault(" / ".join(row[name] for name in key), []).append(index)
        grouped[" × ".join(key)] = dict(sorted(found.items()))
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
