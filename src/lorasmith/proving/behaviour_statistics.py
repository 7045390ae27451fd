"""From numbers per token to the comparison of two models, over all examples and by group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lorasmith.models.divergence import TokenPairs
from lorasmith.models.statistics import (
    Array,
    clustered_error,
    group_fields,
    group_rows,
    mean_interval,
    perplexity,
)
from lorasmith.records.dataset import Example
from lorasmith.records.proof import ExampleComparison, Flip, KLStatistics, TokenComparison


def summarise(rows: Sequence[TokenPairs], seed: int) -> TokenComparison:
    """Compare two models over some examples, given the pairs of each; sums are taken in float64."""
    tokens = TokenPairs.join(rows)
    counts = np.array([len(row) for row in rows], dtype=np.float64)
    a, b = tokens.logprob_a.astype(np.float64), tokens.logprob_b.astype(np.float64)
    loss_a, loss_b = float(-a.mean()), float(-b.mean())
    delta_p = np.exp(b) - np.exp(a)
    return TokenComparison(
        examples=len(rows),
        tokens=len(tokens),
        loss_a=loss_a,
        loss_b=loss_b,
        loss_delta=float((a - b).mean()),
        loss_delta_interval=mean_interval(per_row(a - b, counts), counts, seed),
        perplexity_a=perplexity(loss_a),
        perplexity_b=perplexity(loss_b),
        perplexity_delta=perplexity(loss_b) - perplexity(loss_a),
        perplexity_ratio=perplexity(float((a - b).mean())),
        kl=kl_statistics(tokens.kl.astype(np.float64), counts),
        delta_p_mean=float(delta_p.mean()),
        delta_p_rms=float(np.sqrt(np.mean(delta_p**2))),
        top1_agreement=float(np.mean(tokens.top_a == tokens.top_b)),
        max_abs_delta=float(np.abs(a - b).max()),
    )


def per_row(values: npt.NDArray[np.float64], counts: Array) -> Array:
    """Sums over the tokens of each example."""
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    return np.add.reduceat(values, starts)


def kl_statistics(kl: npt.NDArray[np.float64], counts: Array) -> KLStatistics:
    """Mean with its standard error (examples as clusters of tokens), quantiles and maximum."""
    median, q90, q95, q99, q999 = (float(q) for q in np.quantile(kl, [0.5, 0.9, 0.95, 0.99, 0.999]))
    return KLStatistics(
        mean=float(kl.mean()),
        standard_error=clustered_error(per_row(kl, counts), counts),
        median=median,
        q90=q90,
        q95=q95,
        q99=q99,
        q999=q999,
        max=float(kl.max()),
    )


def by_group(
    examples: Sequence[Example], rows: Sequence[TokenPairs], seed: int
) -> dict[str, dict[str, TokenComparison]]:
    """The comparison for every group and crossing of groups."""
    grouped = group_rows([group_fields(example) for example in examples])
    return {
        dimension: {name: summarise([rows[index] for index in found], seed) for name, found in groups.items()}
        for dimension, groups in grouped.items()
    }


def flips(examples: Sequence[Example], rows: Sequence[TokenPairs]) -> list[Flip]:
    """Every scored position where the two models prefer different tokens."""
    return [
        Flip(
            example=example.id,
            position=int(place),
            token_a=int(row.top_a[place]),
            token_b=int(row.top_b[place]),
            margin=float(row.margin[place]),
        )
        for example, row in zip(examples, rows, strict=True)
        for place in np.flatnonzero(row.top_a != row.top_b)
    ]


def per_example(examples: Sequence[Example], rows: Sequence[TokenPairs]) -> list[ExampleComparison]:
    """One line for each example."""
    found = []
    for example, row in zip(examples, rows, strict=True):
        difference = row.logprob_a.astype(np.float64) - row.logprob_b
        found.append(
            ExampleComparison(
                id=example.id,
                tokens=len(row),
                loss_delta=float(difference.mean()),
                mean_kl=float(row.kl.mean(dtype=np.float64)),
                max_abs_delta=float(np.abs(difference).max()),
                flips=int(np.count_nonzero(row.top_a != row.top_b)),
            )
        )
    return found
