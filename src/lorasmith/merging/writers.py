"""What makes each output tensor from a stretch of stored bytes: copied, cast, replaced, or updated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file

from lorasmith.adapters.base import Change, RowUpdate
from lorasmith.checkpoint.header import TensorFile
from lorasmith.checkpoint.values import TORCH_TYPES
from lorasmith.errors import AdapterError
from lorasmith.merging.disk import Finish, nothing_left
from lorasmith.merging.numbers.blocks import (
    Counts,
    OpenElements,
    Products,
    Undecided,
    cast_piece,
    decide,
    merged_tensor,
    patch,
    prepare_products,
    sum_block,
)
from lorasmith.merging.numbers.dither import Thresholds, ThresholdStream
from lorasmith.merging.numbers.dora import Scaling, decide_scaled, prepare_scaling, scaled_block
from lorasmith.merging.numbers.rounding import TARGETS, cast, overflow
from lorasmith.merging.numbers.threads import Workers
from lorasmith.merging.plan import Output
from lorasmith.merging.tensors import Factors, StoredTensor, TensorOnDisk
from lorasmith.records.merging import MergedTensor

BLOCK_ELEMENTS = 1 << 18
"""2 MiB of float64: the few arrays of one block stay in a core's caches."""


class TensorWriter(Protocol):
    """Turns stored bytes into bytes of the merged tensor, one whole number of elements after the other."""

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> Finish:
        """Write the elements from `first` on into `out`, made from their stored bytes; both are uint8.

        Threads may still be at work on them when this returns: calling what comes back completes the piece.
        """

    def result(self) -> MergedTensor | None:
        """What became of the tensor, once all pieces are made; None where no adapter changed it."""


@dataclass
class CalibratedTensors:
    """The outcome of a calibration, by the names of tensors."""

    files: dict[str, Path] = field(default_factory=dict)
    """The files that hold the rounded tensors."""
    fallbacks: dict[str, str] = field(default_factory=dict)
    """The reasons why others were not calibrated."""
    counts: dict[str, tuple[int, int, float, float]] = field(default_factory=dict)
    """Of weights on a quantized grid: codes that changed, elements with an update, ‖W‖² and ‖ΔW‖²."""


def make_writer(
    output: Output,
    factors: Factors,
    base: TensorFile,
    workers: Workers,
    dither_seed: int | None = None,
    calibrated: CalibratedTensors | None = None,
) -> TensorWriter:
    """The writer of one output tensor; `base` is the file that holds the base's tensor.

    With a seed, tensors with products are dithered; what is copied, cast or replaced never is. What was
    calibrated comes from there.
    """
    change = output.change
    if change is None:
        return CopyWriter(output)
    stored = output.decoded or TensorOnDisk(base.path, base.tensors[change.source])
    if change.updates:
        if calibrated is not None and output.name in calibrated.files:
            plain = UpdateWriter(output, change, factors, stored, workers)
            return CalibratedWriter(output, plain, calibrated.files[output.name])
        stream = None if dither_seed is None else ThresholdStream(dither_seed, output.name)
        # Where a model is calibrated, what could not be is dithered, with the reason in the record.
        fallback = "" if calibrated is None else calibrated.fallbacks[output.name]
        return UpdateWriter(output, change, factors, stored, workers, stream, fallback)
    return ReplacementWriter(output, change, factors, stored)


class CopyWriter:
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


class ReplacementWriter:
    """A tensor, or some of its rows, that the adapter stores itself; also a separated head that keeps W."""

    def __init__(self, output: Output, change: Change, factors: Factors, base: StoredTensor) -> None:
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
        # A piece may begin or end within a row: each row is cut to what lies in this piece.
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
        # A vocabulary that was resized for the training has rows that the base has not: all of them count.
        known = max(0, min(len(result), self._base.info.elements - first))
        before = cast(self._base.read(first, known), TARGETS[self._output.dtype]) if known else result[:0]
        changed = int(torch.count_nonzero(result[:known] != before)) + len(result) - known
        self._counts.changed += changed
        self._counts.updated += changed
        self._counts.underflowed += small

    def result(self) -> MergedTensor:
        """Formula and counts; an element counts as updated where it differs from the base's."""
        return merged_tensor(self._output, self._change, self._counts)


@dataclass(frozen=True)
class Block:
    """A rectangle of a piece, all of it within one range of rows."""

    offset: int
    """The place of its first element within the piece."""
    row: int
    column: int
    height: int
    width: int
    update: RowUpdate


class UpdateWriter:
    """W + Σ w·s·L·R, scaled to DoRA's magnitude where there is one: correctly rounded, or dithered."""

    def __init__(
        self,
        output: Output,
        change: Change,
        factors: Factors,
        base: StoredTensor,
        workers: Workers,
        stream: ThresholdStream | None = None,
        fallback: str = "",
    ) -> None:
        self._output = output
        self._change = change
        self._factors = factors
        self._base = base
        self._workers = workers
        self._stream = stream
        self._fallback = fallback
        self._counts = Counts()
        self._products: dict[int, Products] = {}
        self._counted: set[int] = set()
        self._scaling: Scaling | None = None
        self._width = output.shape[-1] if len(output.shape) > 1 else 1
        self._height = math.prod(output.shape) // self._width if self._width else 0

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> Finish:
        """The merged values: blocks in threads; at the end, all that is still open at once."""
        stored = raw.view(TORCH_TYPES[self._output.source.dtype])
        merged = out.view(TORCH_TYPES[self._output.dtype])
        blocks = list(self._blocks(first, len(stored)))
        self._prepare({block.update.start: block.update for block in blocks})
        products = self._products

        def work(block: Block) -> tuple[Counts, OpenElements | None]:
            here = slice(block.offset, block.offset + block.height * block.width)
            own = products.get(block.update.start)
            shape = (block.height, block.width)
            return self._make(
                block, own, first + block.offset, stored[here].view(shape), merged[here].view(shape)
            )

        made = self._workers.begin(work, blocks)

        def finish() -> None:
            opened: dict[int, list[tuple[Block, OpenElements]]] = {}
            for block, (counts, still_open) in zip(blocks, made(), strict=True):
                self._counts.add(counts)
                if still_open is not None:
                    opened.setdefault(block.update.start, []).append((block, still_open))
            for start, parts in opened.items():
                self._settle(products[start], parts, stored, merged)

        return finish

    def _blocks(self, first: int, count: int) -> Iterator[Block]:
        for offset, row, column, height, width in rectangles(first, count, self._width):
            while height:
                update = update_at(self._change.updates, row, self._height)
                part = min(height, update.stop - row)
                yield Block(offset, row, column, part, width, update)
                offset, row, height = offset + part * width, row + part, height - part

    def _prepare(self, needed: dict[int, RowUpdate]) -> None:
        """Read the factors of the ranges that a piece needs, and forget those of earlier ones."""
        self._products = {start: known for start, known in self._products.items() if start in needed}
        for start, update in needed.items():
            if update.terms and start not in self._products:
                self._products[start] = prepare_products(update, self._factors)
                # A range may be needed again by a later piece, but its norm counts once.
                if self._change.magnitude is None and start not in self._counted:
                    self._counted.add(start)
                    self._counts.update_square += self._products[start].update_square
        if self._change.magnitude is not None and self._scaling is None:
            # DoRA's norms need whole rows or columns: the tensor is read once before its first piece.
            self._scaling = prepare_scaling(
                self._factors(self._change.magnitude),
                self._change.magnitude_axis,
                self._products[0],
                self._base.rows,
                self._height,
                max(1, BLOCK_ELEMENTS // self._width),
                self._output.name,
            )

    def _make(
        self,
        block: Block,
        products: Products | None,
        first: int,
        stored: torch.Tensor,
        merged: torch.Tensor,
    ) -> tuple[Counts, OpenElements | None]:
        """Counts and open elements of one block; `first` is its first element's number in the tensor."""
        if products is None:
            values, small = cast_piece(stored, self._output.dtype, self._output.name)
            merged.copy_(values)
            return Counts(underflowed=small), None
        row = block.row - products.start
        scratch = self._workers.scratch()
        thresholds = None if self._stream is None else self._stream.take(first, stored.numel())
        if self._scaling is None:
            return sum_block(stored, products, row, block.column, merged, scratch, thresholds)
        return scaled_block(stored, products, self._scaling, row, block.column, merged, scratch, thresholds)

    def _settle(
        self,
        products: Products,
        parts: list[tuple[Block, OpenElements]],
        stored: torch.Tensor,
        merged: torch.Tensor,
    ) -> None:
        """Decide the open elements of all blocks of one range at once: their exact sums are slow to begin."""
        target = TARGETS[self._output.dtype]
        places = np.concatenate([block.offset + here.places for block, here in parts])
        opened = Undecided(
            np.concatenate(
                [block.row - products.start + here.places // block.width for block, here in parts]
            ),
            np.concatenate([block.column + here.places % block.width for block, here in parts]),
            np.concatenate([here.candidate for _, here in parts]),
            stored[torch.from_numpy(places)].to(torch.float64).numpy(),
            _joined([here.thresholds for _, here in parts]),
        )
        if self._scaling is None:
            values, ties = decide(opened, products, target, self._output.name)
        else:
            name, read = self._output.name, self._base.rows
            values, ties = decide_scaled(opened, products, self._scaling, target, name, read)
        self._counts.add(patch(merged, stored, places, values, target))
        self._counts.ties += ties

    def result(self) -> MergedTensor:
        """Formula and counts."""
        rounding = "nearest" if self._stream is None else "dithered"
        return merged_tensor(self._output, self._change, self._counts, rounding, self._fallback)


def _joined(parts: Sequence[Thresholds | None]) -> Thresholds | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


def update_at(updates: Sequence[RowUpdate], row: int, count: int) -> RowUpdate:
    """The range of rows that `row` lies in; one without products between those that have some."""
    for update in updates:
        if update.start <= row < update.stop:
            return update
    before = max((update.stop for update in updates if update.stop <= row), default=0)
    after = min((update.start for update in updates if update.start > row), default=max(count, row + 1))
    return RowUpdate(before, after, ())


def rectangles(first: int, count: int, width: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Cut the elements `first` … `first + count` of a matrix with `width` columns into rectangles.

    Gives (offset within the stretch, row, column, height, width), each of at most `BLOCK_ELEMENTS` elements.
    """
    offset = 0
    while offset < count:
        row, column = divmod(first + offset, width)
        if column or count - offset < width or width > BLOCK_ELEMENTS:
            # The rest of a row, its beginning, or a part of a row that is too long for a block.
            height, wide = 1, min(width - column, count - offset, BLOCK_ELEMENTS)
        else:
            height, wide = min((count - offset) // width, BLOCK_ELEMENTS // width), width
        yield offset, row, column, height, wide
        offset += height * wide


class CalibratedWriter:
    """A tensor whose values calibration has left in a file."""

    def __init__(self, output: Output, plain: UpdateWriter, file: Path) -> None:
        self._output = output
        self._plain = plain
        self._values = load_file(file)[output.name].reshape(-1)
        self._changed = 0

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> Finish:
        """The fitted values; the plain merge runs beside it for what it counts and refuses."""
        output, target = self._output, TARGETS[self._output.dtype]
        # Its result is dropped: what counts as an update, and what is refused, is decided in one place.
        plain = self._plain.piece(raw, first, torch.empty_like(out))
        stored = raw.view(TORCH_TYPES[output.source.dtype])
        here = self._values[first : first + len(stored)]
        self._changed += int(torch.count_nonzero(here != cast(stored, target)))
        out.copy_(here.view(torch.uint8))
        return plain

    def result(self) -> MergedTensor:
        """The plain merge's counts with what this rounding moved; an element may move without an update."""
        plain = self._plain.result()
        updated = plain.changed + plain.swallowed
        swallowed = max(0, updated - self._changed)
        moved = {
            "changed": self._changed,
            "swallowed": swallowed,
            "rounding": "calibrated",
            "exact_redone": 0,
        }
        return plain.model_copy(update=moved)
