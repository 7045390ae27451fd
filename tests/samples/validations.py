"""Three validations whose figures fit each other: token losses from a seed, and what follows from them."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorasmith.files.atomic import write_record
from lorasmith.files.digests import hash_file
from lorasmith.records.base import FileDigest, Interval
from lorasmith.records.dataset import Example
from lorasmith.records.scoring import GroupMetrics, ModelIdentity, ScoringSettings, ValidationResult
from tests.samples.rows import VOCABULARY, sha

ROLES = ("base", "adapter", "merged")

Losses = dict[str, list[list[float]]]
"""Role → row → token → loss."""


def identity(role: str) -> ModelIdentity:
    """A model of a role."""
    return ModelIdentity(
        role=role,
        model_sha256=sha("merged" if role == "merged" else "base"),
        adapter_sha256=sha("adapter") if role == "adapter" else None,
        architecture="LlamaForCausalLM",
        parameters=134_515_008,
    )


SETTINGS = ScoringSettings(
    template="chat", max_length=2048, arithmetic="float32", device="cpu", batch_tokens=4096
)


def metrics(losses: list[list[float]]) -> GroupMetrics:
    tokens = [loss for row in losses for loss in row]
    mean = sum(tokens) / len(tokens)
    spread = 0.6 / math.sqrt(len(losses))
    return GroupMetrics(
        examples=len(losses),
        tokens=len(tokens),
        loss=mean,
        perplexity=math.exp(mean),
        interval=Interval(low=mean - spread, high=mean + spread),
    )


def grouped(rows: list[Example], values: list[Any]) -> dict[str, dict[str, list[Any]]]:
    groups: dict[str, dict[str, list[Any]]] = {"source": {}, "domain": {}, "difficulty": {}}
    for row, value in zip(rows, values, strict=True):
        for kind, members in groups.items():
            members.setdefault(getattr(row.metadata, kind), []).append(value)
    return groups


def token_ids(row: Example) -> list[int]:
    """One token a word, the space before it belonging to it, and the end of the turn."""
    first, *others = row.response.split()
    tokens = (first, *(f"▁{word}" for word in others), "<end>")
    return [VOCABULARY.index(token) if token in VOCABULARY else 0 for token in tokens]


def worst(row: Example, losses: list[float]) -> list[dict[str, Any]]:
    ids = token_ids(row)
    places = sorted(range(len(losses)), key=lambda place: -losses[place])[:5]
    return [
        {
            "position": place,
            "token_id": ids[place],
            "text": VOCABULARY[ids[place]],
            "logprob": -losses[place],
        }
        for place in places
    ]


def token_losses(rows: list[Example], *, seed: int = 0) -> dict[str, list[list[float]]]:
    """Role → row → token → loss in nats; the adapter helps where the difficulty is not hard."""
    chance = random.Random(seed)
    result: dict[str, list[list[float]]] = {role: [] for role in ROLES}
    for row in rows:
        hard = row.metadata.difficulty == "hard"
        base = [min(14.0, chance.expovariate(0.7)) for _ in token_ids(row)]
        adapter = [max(1e-5, loss * chance.uniform(0.7, 1.3) * (1.0 if hard else 0.35)) for loss in base]
        result["base"].append(base)
        result["adapter"].append(adapter)
        result["merged"].append([loss * (1 + chance.gauss(0, 2e-3)) for loss in adapter])
    return result


def write_validation(run: Path, rows: list[Example], test_set: FileDigest, losses: Losses) -> None:
    """The three validations and their tables."""
    (run / "validation").mkdir(parents=True, exist_ok=True)
    for role in ROLES:
        table = run / "validation" / f"{role}.parquet"
        mine = losses[role]
        pq.write_table(
            pa.table(
                {
                    "id": [row.id for row in rows],
                    "source": [row.metadata.source for row in rows],
                    "domain": [row.metadata.domain for row in rows],
                    "difficulty": [row.metadata.difficulty for row in rows],
                    "tokens": [len(row) for row in mine],
                    "loss": [sum(row) / len(row) for row in mine],
                    "perplexity": [math.exp(sum(row) / len(row)) for row in mine],
                    "truncated": pa.array([0] * len(rows), pa.int32()),
                    "token_ids": pa.array([token_ids(row) for row in rows], pa.list_(pa.int32())),
                    "logprobs": pa.array([[-loss for loss in row] for row in mine], pa.list_(pa.float32())),
                    "worst": [worst(row, losses) for row, losses in zip(rows, mine, strict=True)],
                }
            ),
            table,
        )
        write_record(
            run / "validation" / f"{role}.json",
            ValidationResult(
                model=identity(role),
                test_set=test_set,
                settings=SETTINGS,
                overall=metrics(mine),
                groups={
                    kind: {name: metrics(group) for name, group in members.items()}
                    for kind, members in grouped(rows, mine).items()
                },
                per_example=FileDigest(path=table.name, bytes=table.stat().st_size, sha256=hash_file(table)),
            ),
        )
