"""The three policies that give a row its difficulty; each label says which policy and field gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorasmith.benchmarks.base import Benchmark, Item
from lorasmith.errors import DataError, os_errors
from lorasmith.files.inputs import open_input
from lorasmith.records.dataset import Example

POLICIES = ("guide", "native", "measured")


def label(policy: str, benchmark: Benchmark, item: Item) -> tuple[str, str]:
    """Difficulty and its origin, such as `("hard", "guide:level")`; `measured` labels come later."""
    if policy == "guide":
        level, field = benchmark.guide_difficulty(item)
        return level, f"guide:{field}"
    if policy == "native":
        return item.native or "unknown", f"native:{item.native_field or 'none'}"
    return "unknown", "measured:pending"


def by_loss(examples: Sequence[Example], losses: Mapping[str, float]) -> list[Example]:
    """Label by terciles of the base model's loss (nats per token): a third each, ties by id.

    Raises `DataError` when an example has no loss.
    """
    missing = [example.id for example in examples if example.id not in losses]
    if missing:
        raise DataError(
            f"{len(missing)} examples have no measured loss, the first is {missing[0]!r}",
            expected="a loss of the base model for every example",
            remedy="validate the base model on this very test set first",
        )
    ranked = sorted(examples, key=lambda example: (losses[example.id], example.id))
    names = ("easy", "medium", "hard")
    labels = {example.id: names[3 * rank // len(ranked)] for rank, example in enumerate(ranked)}
    return [_relabelled(example, labels[example.id]) for example in examples]


def _relabelled(example: Example, difficulty: str) -> Example:
    update = {"difficulty": difficulty, "difficulty_from": "measured:loss"}
    return example.model_copy(update={"metadata": example.metadata.model_copy(update=update)})


def read_losses(path: Path) -> dict[str, float]:
    """Example id → loss in nats per token, from the per-example Parquet file of a validation.

    Raises `DataError` for a file without these columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with os_errors(path, "read the losses"), open_input(path) as handle:
            table = pq.read_table(handle, columns=["id", "loss"])
            return dict(zip(table["id"].to_pylist(), table["loss"].to_pylist(), strict=True))
    except (pa.ArrowException, KeyError) as error:
        raise DataError(
            "this file has no losses",
            where=path,
            expected="the per-example Parquet file of a validation, with the columns id and loss",
            remedy="run `lorasmith validate` with the base model on this test set",
        ) from error
