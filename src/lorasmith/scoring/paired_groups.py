"""Task accuracy of two models by group, paired on the examples: each by its benchmark's main metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorasmith.models.statistics import group_fields, group_rows
from lorasmith.records.compression import TaskQuality
from lorasmith.records.dataset import Example
from lorasmith.records.scoring import TaskEffect
from lorasmith.scoring.paired import paired_tasks, read_columns, task_effect


def paired_quality(
    a_parquet: Path, b_parquet: Path, examples: Sequence[Example], metrics: Sequence[str], *, seed: int = 0
) -> TaskQuality | None:
    """Model B against model A over all questions, by metric and by group, from files of `evaluate_tasks`.

    An example counts by the first of `metrics` that it has on both sides. None where no example has a verdict
    on both sides.
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
            dimension: {name: effect(rows, name) for name, rows in found.items()}
            for dimension, found in groups.items()
        },
        unscored=len(own) - len(both),
    )


def _main_scores(path: Path, metrics: Sequence[str]) -> dict[str, tuple[str, float] | None]:
    """Id → main metric and its value; None without a verdict."""
    found: dict[str, tuple[str, float] | None] = {}
    for row in read_columns(path, ["id", "metrics", "scores"]):
        scores = dict(zip(row["metrics"], row["scores"], strict=True))
        main = next((name for name in metrics if name in scores), None)
        found[row["id"]] = None if main is None else (main, scores[main])
    return found
