"""From answers to verdicts: each benchmark's own judge, its metrics with intervals, the table of rows."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorasmith.benchmarks.base import Benchmark, Unscored
from lorasmith.benchmarks.choices import LETTERS, judge_likelihoods
from lorasmith.benchmarks.registry import BENCHMARKS
from lorasmith.models.load import LoadedModel
from lorasmith.models.session import Workload
from lorasmith.models.statistics import mean_interval
from lorasmith.records.dataset import Example
from lorasmith.records.scoring import TaskMetric
from lorasmith.scoring.answers import RULES, cut

BY_NAME: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in BENCHMARKS}

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("benchmark", pa.string()),
        ("method", pa.string()),
        ("answer", pa.string()),
        ("finished", pa.bool_()),
        ("metrics", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
        ("unscored", pa.string()),
    ]
)
"""Columns of `{role}_tasks.parquet`; `scores` belong to `metrics`, `unscored` says why there are none."""


@dataclass(frozen=True)
class Judged:
    """One example with its answer and verdict."""

    example: Example
    method: str
    answer: str
    finished: bool
    scores: dict[str, float]
    unscored: str = ""


def judge_choice(example: Example, likelihoods: Sequence[float]) -> Judged:
    """The likeliest letter against the right one."""
    best = LETTERS[int(np.argmax(likelihoods))]
    return Judged(example, "likelihood", best, True, judge_likelihoods(example, likelihoods))


def judge_text(work: Workload, row: int, tokens: list[int], finished: bool, loaded: LoadedModel) -> Judged:
    """What its benchmark's judge says of a written answer; without a verdict it is unscored, not wrong."""
    example = work.examples[row]
    answer = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    if work.settings.template == "plain":
        answer = cut(answer, RULES[example.metadata.source].stop_texts)
    try:
        scores = BY_NAME[example.metadata.source].score(example, answer)
    except Unscored as error:
        return Judged(example, "generation", answer, finished, {}, str(error))
    return Judged(example, "generation", answer, finished, scores)


def task_metrics(judged: Sequence[Judged], seed: int) -> list[TaskMetric]:
    """Each benchmark's metrics over its rows, with an interval by bootstrap."""
    found = []
    for name in sorted({one.example.metadata.source for one in judged}):
        own = [one for one in judged if one.example.metadata.source == name]
        reasons = Counter(one.unscored for one in own if one.unscored)
        rules = RULES.get(name) if own[0].method == "generation" else None
        for metric in sorted({metric for one in own for metric in one.scores}) or ["unscored"]:
            scores = np.array([one.scores[metric] for one in own if metric in one.scores])
            found.append(
                TaskMetric(
                    benchmark=name,
                    metric=metric,
                    method=own[0].method,
                    examples=len(own),
                    scored=len(scores),
                    unscored=len(own) - len(scores),
                    reasons=dict(sorted(reasons.items())),
                    hit_limit=sum(not one.finished for one in own),
                    max_new_tokens=rules.max_new_tokens if rules else None,
                    value=float(scores.mean()) if len(scores) else None,
                    interval=mean_interval(scores, np.ones(len(scores)), seed),
                )
            )
    return found


def judged_table(judged: Sequence[Judged]) -> bytes:
    """The Parquet file of the answers: the same rows give the same bytes."""
    rows: list[dict[str, Any]] = [
        {
            "id": one.example.id,
            "benchmark": one.example.metadata.source,
            "method": one.method,
            "answer": one.answer,
            "finished": one.finished,
            "metrics": list(one.scores),
            "scores": list(one.scores.values()),
            "unscored": one.unscored,
        }
        for one in judged
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()
