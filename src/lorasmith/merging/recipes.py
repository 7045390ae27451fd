"""How each output tensor is made from a stretch of stored bytes: copied, cast, or with an update added."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lorasmith.adapters.base import Change, Factor, Rows
from lorasmith.adapters.bias import UNIT
from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.header import ITEM_BITS, TensorFile, TensorInfo
from lorasmith.errors import AdapterError, os_errors
from lorasmith.merging.arithmetic import (
    Counts,
    Open,
    Products,
    Undecided,
    cast_piece,
    decide,
    overflow,
    patch,
    prepare,
    sum_block,
)
from lorasmith.merging.magnitude import Scaling, decide_scaled, prepare_scaling, scaled_block
from lorasmith.merging.plan import Output
from lorasmith.merging.rounding import TARGETS, cast
from lorasmith.merging.workers import Workers
from lorasmith.records.merging import MergedTensor

TORCH_TYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

BLOCK_ELEMENTS = 1 << 18
"""2 MiB of float64: the few arrays of one block stay in a core's caches."""

_RECENT = 4

_LARGEST_FACTOR = 2.0**128
_SMALLEST_FACTOR = 2.0**-150


class Factors:
    """Reads adapter tensors as float64 matrices."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters
        self._recent: dict[tuple[int, str], torch.Tensor] = {}

    def __call__(self, factor: Factor) -> torch.Tensor:
        """A factor in float64; `AdapterError` naming the tensor for NaN, infinite or absurd ones."""
        if factor is UNIT:
            return torch.ones(1, 1, dtype=torch.float64)
        adapter = self._adapters[factor.adapter]
        info = adapter.file.tensors[factor.tensor]
        values = apply_view(self._stored(factor.adapter, info), factor).to(torch.float64)
        if not bool(values.isfinite().all()):
            raise AdapterError(
                f"the adapter tensor {info.name} holds NaN or infinite values",
                where=adapter.file.path,
                expected="finite values",
                remedy="the training diverged or the file is damaged: take an earlier checkpoint",
            )
        if info.dtype == "F64":
            _refuse_extremes(values, info.name, adapter.file.path)
        return values.contiguous()

    def _stored(self, number: int, info: TensorInfo) -> torch.Tensor:
        """A tensor as it is on disk; the last few are kept, as each expert needs a part of the same two."""
        key = (number, info.name)
        if key not in self._recent:
            while len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[key] = read_tensor(self._adapters[number].file.path, info)
        return self._recent[key]


def _refuse_extremes(values: torch.Tensor, name: str, path: Path) -> None:
    # The proof of the error bound needs products that neither under- nor overflow in float64.
    size = values.abs()
    if bool(((size > _LARGEST_FACTOR) | ((size > 0) & (size < _SMALLEST_FACTOR))).any()):
        raise AdapterError(
            f"the adapter tensor {name} holds float64 values beyond the range of float32",
            where=path,
            expected="values between 2**-150 and 2**128 in size",
            remedy="save the adapter in float32",
        )


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """A whole tensor as it is stored."""
    with os_errors(path, "read"), path.open("rb") as handle:
        handle.seek(info.start)
        raw = bytearray(handle.read(info.nbytes))
    if not raw:
        return torch.empty(info.shape, dtype=TORCH_TYPES[info.dtype])
    return torch.frombuffer(raw, dtype=TORCH_TYPES[info.dtype]).reshape(info.shape)


def apply_view(values: torch.Tensor, factor: Factor) -> torch.Tensor:
    """The steps of a factor's view."""
    for step in factor.view:
        match step:
            case ("T",):
                values = values.T
            case ("reshape", *shape):
                values = values.reshape([int(extent) for extent in shape])
            case ("select", dim, index):
                values = values.select(int(dim), int(index))
            case ("narrow", dim, start, length):
                values = values.narrow(int(dim), int(start), int(length))
            case _:
                raise AssertionError(f"unknown view {step}")
    return values


class Stored:
    """A tensor on disk, read in stretches."""

    def __init__(self, path: Path, info: TensorInfo) -> None:
        self.path = path
        self.info = info
        self.width = info.shape[-1] if len(info.shape) > 1 else 1

    def read(self, first: int, count: int) -> torch.Tensor:
        """The elements from `first` on, flat."""
        size = ITEM_BITS[self.info.dtype] // 8
        with os_errors(self.path, "read"), self.path.open("rb") as handle:
            handle.seek(self.info.start + first * size)
            raw = bytearray(handle.read(count * size))
        return torch.frombuffer(raw, dtype=TORCH_TYPES[self.info.dtype])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Whole rows of the tensor as a matrix."""
        return self.read(start * self.width, (stop - start) * self.width).view(stop - start, self.width)


class Recipe(Protocol):
    """Turns stored bytes into bytes of the merged tensor, one whole number of elements after the other."""

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> None:
        """Write the elements from `first` on into `out`, made from their stored bytes; both are uint8."""

    def result(self) -> MergedTensor | None:
        """What became of the tensor, once all pieces are made; None where no adapter changed it."""


class Plain:
    """Byte for byte, or another type, correctly rounded: a tensor that no adapter changed."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> None:
        """The same bytes, or the rounded values."""
        if self._output.dtype == self._output.source.dtype:
            out.copy_(raw)
            return
        stored = raw.view(TORCH_TYPES[self._output.source.dtype])
        result, _ = cast_piece(stored, self._output.dtype, self._output.name)
        out.copy_(result.view(torch.uint8))

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

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> None:
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
    """W + Σ w·s·L·R, correctly rounded, and scaled to DoRA's magnitude where there is one."""

    def __init__(
        self, output: Output, change: Change, factors: Factors, base: Stored, workers: Workers
    ) -> None:
        self._output = output
        self._change = change
        self._factors = factors
        self._base = base
        self._workers = workers
        self._counts = Counts()
        self._products: dict[int, Products] = {}
        self._counted: set[int] = set()
        self._scaling: Scaling | None = None
        self._width = output.shape[-1] if len(output.shape) > 1 else 1
        self._height = math.prod(output.shape) // self._width if self._width else 0

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> None:
        """The merged values: blocks in threads, then all that is still open at once."""
        stored = raw.view(TORCH_TYPES[self._output.source.dtype])
        merged = out.view(TORCH_TYPES[self._output.dtype])
        blocks = list(self._blocks(first, len(stored)))
        self._prepare({block.rows.start: block.rows for block in blocks})

        def work(block: Block) -> tuple[Counts, Open | None]:
            here = slice(block.offset, block.offset + block.height * block.width)
            shape = (block.height, block.width)
            return self._make(block, stored[here].view(shape), merged[here].view(shape))

        opened: dict[int, list[tuple[Block, Open]]] = {}
        for block, (counts, found) in zip(blocks, self._workers.map(work, blocks), strict=True):
            self._counts.add(counts)
            if found is not None:
                opened.setdefault(block.rows.start, []).append((block, found))
        for start, parts in opened.items():
            self._settle(start, parts, stored, merged)

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

    def _make(self, block: Block, stored: torch.Tensor, merged: torch.Tensor) -> tuple[Counts, Open | None]:
        if not block.rows.terms:
            values, small = cast_piece(stored, self._output.dtype, self._output.name)
            merged.copy_(values)
            return Counts(underflowed=small), None
        products = self._products[block.rows.start]
        row = block.row - products.start
        scratch = self._workers.scratch()
        if self._scaling is None:
            return sum_block(stored, products, row, block.column, merged, scratch)
        return scaled_block(stored, products, self._scaling, row, block.column, merged, scratch)

    def _settle(
        self, start: int, parts: list[tuple[Block, Open]], stored: torch.Tensor, merged: torch.Tensor
    ) -> None:
        target = TARGETS[self._output.dtype]
        products = self._products[start]
        places = np.concatenate([block.offset + found.places for block, found in parts])
        opened = Undecided(
            np.concatenate([block.row - start + found.places // block.width for block, found in parts]),
            np.concatenate([block.column + found.places % block.width for block, found in parts]),
            np.concatenate([found.candidate for _, found in parts]),
            stored[torch.from_numpy(places)].to(torch.float64).numpy(),
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
        return merged_tensor(self._output, self._change, self._counts)


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


def merged_tensor(output: Output, change: Change, counts: Counts) -> MergedTensor:
    """The record of one changed tensor."""
    scales = {term.scale * term.weight for rows in change.rows for term in rows.terms}
    return MergedTensor(
        name=output.name,
        formula=change.formula,
        adapter_tensors=list(change.uses),
        scale=scales.pop() if len(scales) == 1 else None,
        shape=list(output.shape),
        dtype_base=output.source.dtype,
        dtype_merged=output.dtype,
        elements=math.prod(output.shape),
        changed=counts.changed,
        swallowed=max(0, counts.updated - counts.changed),
        exact_redone=counts.ties,
        underflowed=counts.underflowed,
        relative_update=four_digits(math.sqrt(counts.update_square / counts.base_square))
        if counts.base_square
        else 0.0,
    )


def four_digits(number: float) -> float:
    """Rounded so far that the order of a sum, which differs between machines, no longer shows."""
    return float(f"{number:.3e}")


def make_recipe(output: Output, factors: Factors, base: TensorFile, workers: Workers) -> Recipe:
    """The recipe of one output tensor; `base` is the file that holds the base's tensor."""
    change = output.change
    if change is None:
        return Plain(output)
    stored = Stored(base.path, base.tensors[change.source])
    if change.rows:
        return LowRank(output, change, factors, stored, workers)
    return Replaced(output, change, factors, stored)
