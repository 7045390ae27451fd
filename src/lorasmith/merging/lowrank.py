"""Tensors with an update of low rank: cut into blocks, made in threads, open elements settled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorasmith.adapters.base import Change, Rows
from lorasmith.merging.arithmetic import (
    Open,
    Products,
    Undecided,
    cast_piece,
    decide,
    patch,
    prepare,
    sum_block,
)
from lorasmith.merging.counts import Counts, merged_tensor
from lorasmith.merging.dither import Stream, Thresholds
from lorasmith.merging.magnitude import Scaling, decide_scaled, prepare_scaling, scaled_block
from lorasmith.merging.plan import Output
from lorasmith.merging.rounding import TARGETS
from lorasmith.merging.running import Finish
from lorasmith.merging.tensors import TORCH_TYPES, Factors, Stored
from lorasmith.merging.workers import Workers
from lorasmith.records.merging import MergedTensor

BLOCK_ELEMENTS = 1 << 18
"""2 MiB of float64: the few arrays of one block stay in a core's caches."""


@dataclass(frozen=True)
class Block:
    """A rectangle of a piece."""

    offset: int
    """Of its first element within the piece."""
    row: int
    column: int
    height: int
    width: int
    rows: Rows


class LowRank:
    """W + Σ w·s·L·R, scaled to DoRA's magnitude where there is one: correctly rounded, or dithered."""

    def __init__(
        self,
        output: Output,
        change: Change,
        factors: Factors,
        base: Stored,
        workers: Workers,
        stream: Stream | None = None,
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
        self._prepare({block.rows.start: block.rows for block in blocks})
        products = self._products

        def work(block: Block) -> tuple[Counts, Open | None]:
            here = slice(block.offset, block.offset + block.height * block.width)
            own = products.get(block.rows.start)
            shape = (block.height, block.width)
            return self._make(
                block, own, first + block.offset, stored[here].view(shape), merged[here].view(shape)
            )

        made = self._workers.begin(work, blocks)

        def finish() -> None:
            opened: dict[int, list[tuple[Block, Open]]] = {}
            for block, (counts, found) in zip(blocks, made(), strict=True):
                self._counts.add(counts)
                if found is not None:
                    opened.setdefault(block.rows.start, []).append((block, found))
            for start, parts in opened.items():
                self._settle(products[start], parts, stored, merged)

        return finish

    def _blocks(self, first: int, count: int) -> Iterator[Block]:
        for offset, row, column, height, width in rectangles(first, count, self._width):
            while height:
                rows = rows_at(self._change.rows, row, self._height)
                part = min(height, rows.stop - row)
                yield Block(offset, row, column, part, width, rows)
                offset, row, height = offset + part * width, row + part, height - part

    def _prepare(self, needed: dict[int, Rows]) -> None:
        """Read the factors of the ranges that a piece needs, and forget those of earlier ones."""
        self._products = {start: found for start, found in self._products.items() if start in needed}
        for start, rows in needed.items():
            if rows.terms and start not in self._products:
                self._products[start] = prepare(rows, self._factors)
                if self._change.magnitude is None and start not in self._counted:
                    self._counted.add(start)
                    self._counts.update_square += self._products[start].update_square
        if self._change.magnitude is not None and self._scaling is None:
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
    ) -> tuple[Counts, Open | None]:
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
        parts: list[tuple[Block, Open]],
        stored: torch.Tensor,
        merged: torch.Tensor,
    ) -> None:
        target = TARGETS[self._output.dtype]
        places = np.concatenate([block.offset + found.places for block, found in parts])
        opened = Undecided(
            np.concatenate(
                [block.row - products.start + found.places // block.width for block, found in parts]
            ),
            np.concatenate([block.column + found.places % block.width for block, found in parts]),
            np.concatenate([found.candidate for _, found in parts]),
            stored[torch.from_numpy(places)].to(torch.float64).numpy(),
            _joined([found.thresholds for _, found in parts]),
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


def rows_at(ranges: Sequence[Rows], row: int, count: int) -> Rows:
    """The range of rows that `row` lies in; one without products between those that have some."""
    for rows in ranges:
        if rows.start <= row < rows.stop:
            return rows
    before = max((rows.stop for rows in ranges if rows.stop <= row), default=0)
    after = min((rows.start for rows in ranges if rows.start > row), default=max(count, row + 1))
    return Rows(before, after, ())


def rectangles(first: int, count: int, width: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Cut the elements `first` … `first + count` of a matrix with `width` columns into rectangles.

    Gives (offset within the stretch, row, column, height, width), each of at most `BLOCK_ELEMENTS` elements.
    """
    offset = 0
    while offset < count:
        row, column = divmod(first + offset, width)
        if column or count - offset < width or width > BLOCK_ELEMENTS:
            height, wide = 1, min(width - column, count - offset, BLOCK_ELEMENTS)
        else:
            height, wide = min((count - offset) // width, BLOCK_ELEMENTS // width), width
        yield offset, row, column, height, wide
        offset += height * wide
