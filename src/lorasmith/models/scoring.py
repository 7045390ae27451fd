"""Log-probabilities of the scored tokens, batch after batch, row by row independent of their company."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.errors import CheckpointError
from lorasmith.machine.allocator import keep_memory
from lorasmith.models.batches import Batch, halve, make_batch
from lorasmith.models.device import Route, conditions_of, is_out_of_memory, release_memory, use_route
from lorasmith.models.forward import CHUNK, TokenForward, first_non_finite
from lorasmith.models.load import LoadedModel
from lorasmith.models.text import Encoded
from lorasmith.records.scoring import Conditions

Floats = npt.NDArray[np.float32]

_PADDING_TRIED = 7
"""Padding behind the first row when the model is examined; any number will do."""


def check_ids(encoded: Sequence[Encoded], names: Sequence[str], vocabulary: int) -> None:
    """Raise `CheckpointError` naming the first row with a token that the model's embedding does not have."""
    for row, name in zip(encoded, names, strict=True):
        if max(row.ids) >= vocabulary:
            raise CheckpointError(
                f"token {max(row.ids)} is beyond the model's embedding of {vocabulary:,} rows",
                where=f"example {name!r}",
                expected="a tokenizer and a model of one vocabulary",
                remedy="copy the tokenizer files that belong to the model into its folder",
            )


@contextmanager
def open_forward(loaded: LoadedModel, encoded: Sequence[Encoded], route: Route) -> Iterator[TokenForward]:
    """The model's forward, examined on the shortest row, with the arithmetic of `route` inside the block."""
    with keep_memory(), use_route(route), examine(loaded, encoded) as forward:
        yield forward


def examine(loaded: LoadedModel, encoded: Sequence[Encoded]) -> TokenForward:
    """The model's forward, its way to finish chosen on the shortest row; to be called inside `use_route`."""
    shortest = min(range(len(encoded)), key=lambda row: (len(encoded[row].ids), row))
    alone = make_batch([shortest], encoded)
    padded = make_batch([shortest], encoded, pad_to=len(encoded[shortest].ids) + _PADDING_TRIED)
    forward = TokenForward(loaded.model, loaded.device)
    try:
        forward.verify(alone.to(loaded.device), padded.to(loaded.device))
    except BaseException:
        forward.__exit__()
        raise
    return forward


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[n] log softmax(logits)[target] from [n, V] float32 logits.

    Taken about the row's largest logit, so that the rounding is that of a difference of small numbers.
    """
    top = logits.amax(-1, keepdim=True)
    shifted = logits - top
    chosen = shifted.gather(-1, targets[:, None].to(logits.device))[:, 0]
    return chosen - shifted.exp_().sum(-1).log()


def score_states(
    forward: TokenForward, batch: Batch, names: Sequence[str]
) -> tuple[list[Floats], torch.Tensor]:
    """Per row of the batch, the natural log-probability of each scored token; and the [N, H] hidden states
    that they come from.

    Raises `CheckpointError` naming the row, and the first layer, where a result is not finite.
    """
    batch = batch.to(forward.device)
    hidden = forward.hidden(batch)
    logprobs = [
        token_logprobs(forward.logits_of(part), targets)
        for part, targets in zip(hidden.split(CHUNK), batch.targets.split(CHUNK), strict=True)
    ]
    rows = [part.cpu().numpy() for part in torch.cat(logprobs).split(list(batch.counts))]
    for row, values in zip(batch.rows, rows, strict=True):
        if not np.isfinite(values).all():
            raise_non_finite(forward, batch, names[row])
    return rows, hidden


def raise_non_finite(forward: TokenForward, batch: Batch, name: str) -> None:
    """Raise `CheckpointError` for a row whose logits are not finite, with the module where it began."""
    layer = first_non_finite(forward.model, batch)
    raise CheckpointError(
        "the model's logits are not finite"
        + (f"; the first such output is that of {layer}" if layer else ""),
        where=f"example {name!r}",
        expected="finite numbers",
        remedy="check the weights of that layer: training may have diverged, or the file be damaged",
    )


def row_loss(logprobs: Floats) -> float:
    """Sum of −log p over a row's tokens, in float64, in nats."""
    return -float(np.sum(logprobs, dtype=np.float64))


# Batches of rows as work for an executor: how they split, how large they are, how results are kept.


R = TypeVar("R")
T = TypeVar("T")
Rows = tuple[int, ...]
Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class RowWork(Generic[R, T]):
    """Something done to rows of a test set, batch by batch."""

    encoded: Sequence[Encoded]
    device: torch.device
    action: Callable[[Rows], R]
    to_arrays: Callable[[R], Arrays]
    from_arrays: Callable[[Rows, Arrays], R]
    per_row: Callable[[R], Sequence[T]]
    """What the caller keeps of a batch's result: one item for each of its rows."""

    def run(self, rows: Rows) -> R:
        """The result of a batch."""
        return self.action(rows)

    def split(self, rows: Rows) -> list[Rows]:
        """Two halves, or nothing for a single row."""
        return halve(rows)

    def size(self, rows: Rows) -> int:
        """Padded tokens of the batch."""
        return len(rows) * max(len(self.encoded[row].ids) for row in rows)

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether the error says that memory ran out."""
        return is_out_of_memory(error)

    def release(self) -> None:
        """Give back what a failed attempt still holds."""
        release_memory()

    def pack(self, result: R) -> bytes:
        """The result's arrays as bytes."""
        return pack_arrays(self.to_arrays(result))

    def unpack(self, rows: Rows, packed: bytes) -> R:
        """Back from `pack`."""
        return self.from_arrays(rows, unpack_arrays(packed))

    def conditions(self) -> Conditions:
        """What the device here computes under."""
        return conditions_of(self.device)


def pack_arrays(arrays: Arrays) -> bytes:
    """The arrays one after the other, in numpy's own file format."""
    sink = io.BytesIO()
    for array in arrays:
        np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


def unpack_arrays(packed: bytes) -> Arrays:
    """Back from `pack_arrays`."""
    source, arrays = io.BytesIO(packed), []
    while source.tell() < len(packed):
        arrays.append(np.load(source, allow_pickle=False))
    return arrays
