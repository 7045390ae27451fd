"""How each output tensor is made from a stretch of stored bytes: copied, cast, or with an update added."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from lorasmith.adapters.base import Change, Factor
from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.header import TensorInfo
from lorasmith.errors import AdapterError, os_errors
from lorasmith.merging.arithmetic import Counts, Products, cast_piece, low_rank_piece, prepare
from lorasmith.merging.plan import Output
from lorasmith.records.merging import MergedTensor

TORCH_TYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

BLOCK_ELEMENTS = 1 << 17
"""1 MiB of float64: the few arrays of one block stay in a core's cache."""

_LARGEST_FACTOR = 2.0**128
_SMALLEST_FACTOR = 2.0**-150


class Factors:
    """Reads adapter tensors as float64 matrices."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters

    def __call__(self, factor: Factor) -> torch.Tensor:
        """A factor in its orientation; `AdapterError` naming the tensor for NaN, infinite or absurd ones."""
        adapter = self._adapters[factor.adapter]
        info = adapter.file.tensors[factor.tensor]
        values = read_tensor(adapter.file.path, info).to(torch.float64)
        if not bool(values.isfinite().all()):
            raise AdapterError(
                f"the adapter tensor {info.name} holds NaN or infinite values",
                where=adapter.file.path,
                expected="finite values",
                remedy="the training diverged or the file is damaged: take an earlier checkpoint",
            )
        if info.dtype == "F64":
            _refuse_extremes(values, info.name, adapter.file.path)
        return apply_view(values, factor).contiguous()


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


class Recipe(Protocol):
    """Turns stored bytes into bytes of the merged tensor, one whole number of elements after the other."""

    def piece(self, raw: torch.Tensor, first: int) -> torch.Tensor:
        """Bytes (uint8) of the elements from `first` on, made from their stored bytes."""

    def result(self) -> MergedTensor | None:
        """What became of the tensor, once all pieces are made; None where no adapter changed it."""


class Copy:
    """Byte for byte."""

    def piece(self, raw: torch.Tensor, first: int) -> torch.Tensor:
        """The same bytes."""
        return raw

    def result(self) -> None:
        """Nothing happened to it."""
        return


class Cast:
    """Another type, correctly rounded."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def piece(self, raw: torch.Tensor, first: int) -> torch.Tensor:
        """The rounded values."""
        stored = raw.view(TORCH_TYPES[self._output.source.dtype])
        result, _ = cast_piece(stored, self._output.dtype, self._output.name)
        return result.view(torch.uint8)

    def result(self) -> None:
        """No adapter changed it."""
        return


class LowRank:
    """W + Σ w·s·L·R, correctly rounded."""

    def __init__(self, output: Output, change: Change, factors: Factors) -> None:
        self._output = output
        self._change = change
        self._factors = factors
        self._counts = Counts()
        self._products: Products | None = None
        self._stop = 0
        self._width = output.shape[-1] if len(output.shape) > 1 else 1

    def piece(self, raw: torch.Tensor, first: int) -> torch.Tensor:
        """The merged values, block by block so that each block's arrays stay in the cache."""
        stored = raw.view(TORCH_TYPES[self._output.source.dtype])
        merged = torch.empty(len(stored), dtype=TORCH_TYPES[self._output.dtype])
        for offset, row, column, height, width in rectangles(first, len(stored), self._width):
            while height:
                products = self._of_row(row)
                part = min(height, self._stop - row)
                here = slice(offset, offset + part * width)
                values, counts = low_rank_piece(
                    stored[here].view(part, width),
                    products,
                    row - products.start,
                    column,
                    self._output.dtype,
                    self._output.name,
                )
                merged[here] = values.view(-1)
                self._counts.add(counts)
                offset, row, height = here.stop, row + part, height - part
        return merged.view(torch.uint8)

    def _of_row(self, row: int) -> Products:
        if self._products is None or not self._products.start <= row < self._stop:
            rows = next(rows for rows in self._change.rows if rows.start <= row < rows.stop)
            self._products, self._stop = prepare(rows, self._factors), rows.stop
            self._counts.update_square += self._products.update_square
        return self._products

    def result(self) -> MergedTensor:
        """Formula and counts."""
        return merged_tensor(self._output, self._change, self._counts)


def rectangles(first: int, count: int, width: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Cut the elements `first` … `first + count` of a matrix with `width` columns into rectangles.

    Gives (offset within the stretch, row, column, height, width), each of at most `BLOCK_ELEMENTS` elements
    or one row.
    """
    offset = 0
    while offset < count:
        row, column = divmod(first + offset, width)
        if column or count - offset < width:
            height, wide = 1, min(width - column, count - offset)
        else:
            height, wide = min((count - offset) // width, max(1, BLOCK_ELEMENTS // width)), width
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


def make_recipe(output: Output, factors: Factors) -> Recipe:
    """The recipe of one output tensor."""
    if output.change is None:
        return Copy() if output.dtype == output.source.dtype else Cast(output)
    return LowRank(output, output.change, factors)
