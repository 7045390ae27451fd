"""From log-probabilities of tokens to loss and perplexity of groups, and the table of rows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorasmith.models.encode import Encoded
from lorasmith.models.loglik import Floats, row_loss
from lorasmith.models.statistics import Array, group_fields, group_rows, mean_interval, perplexity
from lorasmith.records.dataset import Example
from lorasmith.records.scoring import GroupMetrics

WORST = 5
"""Tokens of each row that are listed with their text: those the model expected least."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("domain", pa.string()),
        ("difficulty", pa.string()),
        ("tokens", pa.int32()),
        ("loss", pa.float64()),
        ("perplexity", pa.float64()),
        ("truncated", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        (
            "worst",
            pa.list_(
                pa.struct(
                    [
                        ("position", pa.int32()),
                        ("token_id", pa.int32()),
                        ("text", pa.string()),
                        ("logprob", pa.float32()),
                    ]
                )
            ),
        ),
    ]
)
"""Columns of the per-example Parquet file; `position` counts scored tokens from 0."""


def group_metrics(losses: Array, tokens: Array, rows: Sequence[int] | None, seed: int) -> GroupMetrics:
    """Token-weighted loss of the given rows (None: all) from per-row loss sums and token counts."""
    if rows is not None:
        losses, tokens = losses[list(rows)], tokens[list(rows)]
    loss = float(losses.sum() / tokens.sum())
    return GroupMetrics(
        examples=len(losses),
        tokens=int(tokens.sum()),
        loss=loss,
        perplexity=perplexity(loss),
        interval=mean_interval(losses, tokens, seed),
    )


def aggregate(
    examples: Sequence[Example], logprobs: Sequence[Floats], seed: int
) -> tuple[GroupMetrics, dict[str, dict[str, GroupMetrics]]]:
    """Metrics over all rows, and by group and crossing of groups."""
    losses = np.array([row_loss(row) for row in logprobs])
    tokens = np.array([len(row) for row in logprobs], dtype=np.float64)
    overall = group_metrics(losses, tokens, None, seed)
    grouped = group_rows([group_fields(example) for example in examples])
    groups = {
        dimension: {name: group_metrics(losses, tokens, rows, seed) for name, rows in found.items()}
        for dimension, found in grouped.items()
    }
    return overall, groups


def example_table(
    examples: Sequence[Example], encoded: Sequence[Encoded], logprobs: Sequence[Floats], tokenizer: Any
) -> bytes:
    """The per-example Parquet file: the same rows give the same bytes."""
    rows = []
    for example, tokens, values in zip(examples, encoded, logprobs, strict=True):
        ids = tokens.ids[tokens.scored_from :]
        loss = row_loss(values) / len(values)
        worst = np.argsort(values, kind="stable")[:WORST]
        rows.append(
            {
                "id": example.id,
                **group_fields(example),
                "tokens": len(ids),
                "loss": loss,
                "perplexity": perplexity(loss),
                "truncated": tokens.truncated,
                "token_ids": ids,
                "logprobs": values,
                "worst": [
                    {
                        "position": int(place),
                        "token_id": ids[place],
                        "text": tokenizer.decode([ids[place]]),
                        "logprob": values[place],
                    }
                    for place in worst
                ],
            }
        )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()
