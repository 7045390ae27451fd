"""How each output tensor is made from a stretch of stored bytes: copied, cast, replaced, or updated."""

from __future__ import annotations

from typing import Protocol

import torch

from lorasmith.adapters.base import Change
from lorasmith.checkpoint.header import TensorFile
from lorasmith.errors import AdapterError
from lorasmith.merging.arithmetic import cast_piece
from lorasmith.merging.counts import Counts, merged_tensor
from lorasmith.merging.dither import Stream
from lorasmith.merging.fitted import Calibrated, Fitted
from lorasmith.merging.lowrank import LowRank
from lorasmith.merging.plan import Output
from lorasmith.merging.refusals import overflow
from lorasmith.merging.rounding import TARGETS, cast
from lorasmith.merging.running import Finish, nothing_left
from lorasmith.merging.tensors import TORCH_TYPES, Factors, Stored
from lorasmith.merging.workers import Workers
from lorasmith.records.merging import MergedTensor


class Recipe(Protocol):
    """Turns stored bytes into bytes of the merged tensor, one whole number of elements after the other."""

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> Finish:
        """Write the elements from `first` on into `out`, made from their stored bytes; both are uint8.

        Threads may still be at work on them when this returns: calling what comes back completes the piece.
        """

    def result(self) -> MergedTensor | None:
        """What became of the tensor, once all pieces are made; None where no adapter changed it."""


class Plain:
    """Byte for byte, or another type, correctly rounded: a tensor that no adapter changed."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> Finish:
        """The same bytes, or the rounded values."""
        if self._output.dtype == self._output.source.dtype:
            out.copy_(raw)
            return nothing_left
        stored = raw.view(TORCH_TYPES[self._output.source.dtype])
        result, _ = cast_piece(stored, self._output.dtype, self._output.name)
        out.copy_(result.view(torch.uint8))
        return nothing_left

    def result(self) -> None:
        """No adapter changed it."""
        return


class Replaced:
    """A tensor, or some of its rows, that the adapter stores itself; also a separated head that keeps W."""

    def __init__(self, output: Output, change: Change, factors: Factors, base: Stored) -> None:
        self._output = output
        self._change = change
        self._base = base
        self._counts = Counts()
        self._rows = factors(change.row_values) if change.row_values else None

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> Finish:
        """The adapter's values in the merged type."""
        output = self._output
        stored = raw.view(TORCH_TYPES[output.source.dtype])
        if output.adapter is not None and not bool(stored.isfinite().all()):
            raise AdapterError(
                f"the adapter tensor {output.source.name} holds NaN or infinite values",
                expected="finite values",
                remedy="the training diverged or the file is damaged: take an earlier checkpoint",
            )
        result, small = cast_piece(stored, output.dtype, output.name)
        if self._rows is not None:
            result = self._with_rows(result.clone(), first)
        self._count(result, first, small)
        out.copy_(result.view(torch.uint8))
        return nothing_left

    def _with_rows(self, result: torch.Tensor, first: int) -> torch.Tensor:
        assert self._rows is not None
        width = self._rows.shape[1]
        for values, row in zip(self._rows, self._change.row_indices, strict=True):
            start, stop = row * width - first, (row + 1) * width - first
            if stop <= 0 or start >= len(result):
                continue
            rounded = cast(values, TARGETS[self._output.dtype])
            if bool(rounded.isinf().any()):
                raise overflow(self._output.name, TARGETS[self._output.dtype])
            result[max(start, 0) : stop] = rounded[max(-start, 0) : width - max(stop - len(result), 0)]
        return result

    def _count(self, result: torch.Tensor, first: int, small: int) -> None:
        known = max(0, min(len(result), self._base.info.elements - first))
        before = cast(self._base.read(first, known), TARGETS[self._output.dtype]) if known else result[:0]
        changed = int(torch.count_nonzero(result[:known] != before)) + len(result) - known
        self._counts.changed += changed
        self._counts.updated += changed
        self._counts.underflowed += small

    def result(self) -> MergedTensor:
        """How many elements differ from the base's."""
        return merged_tensor(self._output, self._change, self._counts)


def make_recipe(
    output: Output,
    factors: Factors,
    base: TensorFile,
    workers: Workers,
    dither_seed: int | None = None,
    calibrated: Calibrated | None = None,
) -> Recipe:
    """The recipe of one output tensor; `base` is the file that holds the base's tensor.

    With a seed, tensors with products are dithered; what is copied, cast or replaced never is. What was
    calibrated comes from there.
    """
    change = output.change
    if change is None:
        return Plain(output)
    stored = Stored(base.path, base.tensors[change.source])
    if change.rows:
        if calibrated is not None and output.name in calibrated.files:
            plain = LowRank(output, change, factors, stored, workers)
            return Fitted(output, plain, calibrated.files[output.name])
        stream = None if dither_seed is None else Stream(dither_seed, output.name)
        fallback = "" if calibrated is None else calibrated.fallbacks[output.name]
        return LowRank(output, change, factors, stored, workers, stream, fallback)
    return Replaced(output, change, factors, stored)
