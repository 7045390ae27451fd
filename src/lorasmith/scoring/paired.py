"""Does model B do better than model A? Paired on the examples, from the Parquet files of two validations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorasmith.errors import DataError
from lorasmith.files.parquet import read_table
from lorasmith.models.statistics import (
    Array,
    group_fields,
    group_rows,
    mean_interval,
    perplexity,
    sign_flip_p,
)
from lorasmith.records.base import Interval
from lorasmith.records.compression import TaskQuality
from lorasmith.records.dataset import Example
from lorasmith.records.proof import PairedEffect
from lorasmith.records.scoring import TaskEffect

_COLUMNS = ["id", "source", "domain", "difficulty", "token_ids", "logprobs"]

SIGNIFICANT = 0.05
"""A verdict needs an interval off 0 and a p-value below this: a bootstrap of few examples is too sure."""


def paired_effects(
    a_parquet: Path, b_parquet: Path, *, seed: int = 0
) -> tuple[PairedEffect, dict[str, dict[str, PairedEffect]]]:
    """Model B against model A over all examples, and by group, from files that `validate` wrote.

    The token-weighted difference of the losses (nats per token) with a 95 % bootstrap interval over
    examples, a sign-flip p-value, and the verdict: `helps`, `no clear effect` or `hurts`. Raises
    `DataError` unless both files hold the same examples with the same scored tokens.
    """
    a, b = read_table(a_parquet, _COLUMNS).to_pylist(), read_table(b_parquet, _COLUMNS).to_pylist()
    if [row["id"] for row in a] != [row["id"] for row in b]:
        raise DataError(
            "the two validations hold different examples",
            where=b_parquet,
            expected=f"the examples of {a_parquet}",
            remedy="validate both models on the same test set",
        )
    for row_a, row_b in zip(a, b, strict=True):
        if row_a["token_ids"] != row_b["token_ids"]:
            raise DataError(
                f"the two validations scored different tokens of example {row_a['id']!r}",
                where=b_parquet,
                expected=f"the tokens of {a_parquet}",
                remedy="validate both models with the same tokenizer, template and options",
            )
    tokens = np.array([len(row["token_ids"]) for row in a], dtype=np.float64)
    loss_a, loss_b = (
        np.array([-np.sum(np.asarray(row["logprobs"], dtype=np.float64)) for row in rows]) for rows in (a, b)
    )
    overall = paired_effect(loss_a, loss_b, tokens, seed)
    groups = {
        dimension: {
            name: paired_effect(loss_a[rows], loss_b[rows], tokens[rows], seed)
            for name, rows in members.items()
        }
        for dimension, members in group_rows(a).items()
    }
    return overall, groups


def paired_effect(loss_a: Array, loss_b: Array, tokens: Array, seed: int) -> PairedEffect:
    """One comparison from per-example loss sums in nats and token counts."""
    difference = loss_b - loss_a
    total = tokens.sum()
    mean_a, mean_b = float(loss_a.sum() / total), float(loss_b.sum() / total)
    interval = mean_interval(difference, tokens, seed)
    p_value = sign_flip_p(difference, seed)
    return PairedEffect(
        examples=len(tokens),
        tokens=int(total),
        loss_a=mean_a,
        loss_b=mean_b,
        loss_delta=float(difference.sum() / total),
        perplexity_delta=perplexity(mean_b) - perplexity(mean_a),
        interval=interval,
        p_value=p_value,
        verdict=_verdict(interval, p_value, better="lower"),
    )


def paired_tasks(a_parquet: Path, b_parquet: Path, *, seed: int = 0) -> list[TaskEffect]:
    """Model B against model A on the benchmarks' own metrics, from files that `evaluate_tasks` wrote.

    Over the examples that both have a verdict for; interval and p-value as in `paired_effects`.
    """
    a, b = _read_scores(a_parquet), _read_scores(b_parquet)
    effects = []
    # By benchmark, and within it in the judge's own order: the first is the main one.
    for benchmark, metric in sorted((key for key in a if key in b), key=lambda key: key[0]):
        one, two = a[benchmark, metric], b[benchmark, metric]
        both = sorted(set(one) & set(two))
        if both:
            values_a, values_b = (np.array([side[name][0] for name in both]) for side in (one, two))
            weights = np.array([one[name][1] for name in both])
            effects.append(task_effect(benchmark, metric, values_a, values_b, seed, weights))
    return effects


def task_effect(
    benchmark: str,
    metric: str,
    values_a: Array,
    values_b: Array,
    seed: int,
    weights: Array | None = None,
) -> TaskEffect:
    """One comparison from the scores of the same examples on both sides, of equal weight unless given."""
    weights = np.ones(len(values_a)) if weights is None else weights
    difference = (values_b - values_a) * weights
    interval = mean_interval(difference, weights, seed)
    p_value = sign_flip_p(difference, seed)
    return TaskEffect(
        benchmark=benchmark,
        metric=metric,
        examples=len(values_a),
        value_a=float((values_a * weights).sum() / weights.sum()),
        value_b=float((values_b * weights).sum() / weights.sum()),
        delta=float(difference.sum() / weights.sum()),
        interval=interval,
        p_value=p_value,
        verdict=_verdict(interval, p_value, better="higher"),
    )


def _verdict(interval: Interval | None, p_value: float, *, better: str) -> str:
    if interval is None or p_value >= SIGNIFICANT or interval.low <= 0 <= interval.high:
        return "no clear effect"
    return "helps" if (interval.low > 0) == (better == "higher") else "hurts"


def _read_scores(path: Path) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """(benchmark, metric) → id → score and weight."""
    scores_by_metric: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for row in read_table(path, ["id", "benchmark", "metrics", "scores", "weights"]).to_pylist():
        for metric, *scored in zip(row["metrics"], row["scores"], row["weights"], strict=True):
            scores_by_metric.setdefault((row["benchmark"], metric), {})[row["id"]] = (scored[0], scored[1])
    return scores_by_metric


# Task accuracy of two models by group, paired on the examples: each by its benchmark's main metric.


def paired_quality(
    a_parquet: Path, b_parquet: Path, examples: Sequence[Example], metrics: Sequence[str], *, seed: int = 0
) -> TaskQuality | None:
    """Model B against model A over all questions, by metric and by group, from files of `evaluate_tasks`.

    An example counts by the first of `metrics` that it has, else by the first that its judge names. None
    where no example has a verdict on both sides.
    """
    a, b = (_main_scores(path, metrics) for path in (a_parquet, b_parquet))
    own = {example.id: example for example in examples if example.id in a}
    both, pairs = [], []
    for name in own:
        one, two = a[name], b.get(name)
        if one is not None and two is not None and one[0] == two[0]:
            both.append(name)
            pairs.append((one, two))
    if not both:
        return None

    def effect(rows: Sequence[int], label: str) -> TaskEffect:
        kinds = sorted({pairs[row][0][0] for row in rows})
        values = np.array([[one[1], two[1]] for one, two in (pairs[row] for row in rows)])
        return task_effect(label, " / ".join(kinds), values[:, 0], values[:, 1], seed)

    groups = group_rows([group_fields(own[name]) for name in both])
    return TaskQuality(
        overall=effect(range(len(both)), "all"),
        metrics=paired_tasks(a_parquet, b_parquet, seed=seed),
        groups={
            dimension: {name: effect(rows, name) for name, rows in members.items()}
            for dimension, members in groups.items()
        },
        unscored=len(own) - len(both),
    )


def _main_scores(path: Path, metrics: Sequence[str]) -> dict[str, tuple[str, float] | None]:
    """Id → main metric and its value; None without a verdict."""
    main_scores: dict[str, tuple[str, float] | None] = {}
    for row in read_table(path, ["id", "metrics", "scores"]).to_pylist():
        scores = dict(zip(row["metrics"], row["scores"], strict=True))
        main = next((name for name in (*metrics, *scores) if name in scores), None)
        main_scores[row["id"]] = None if main is None else (main, scores[main])
    return main_scores
