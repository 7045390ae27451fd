"""Batches of rows as work for an executor: how they split, how large they are, how results are kept."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.models.batches import halve
from lorasmith.models.conditions import conditions_of
from lorasmith.models.encode import Encoded
from lorasmith.models.memory import is_out_of_memory, release_memory
from lorasmith.records.conditions import Conditions

R = TypeVar("R")
Rows = tuple[int, ...]
Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class RowWork(Generic[R]):
    """Something done to rows of a test set, batch by batch."""

    encoded: Sequence[Encoded]
    device: torch.device
    action: Callable[[Rows], R]
    to_arrays: Callable[[R], Arrays]
    from_arrays: Callable[[Rows, Arrays], R]

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
        """Of the device here."""
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
