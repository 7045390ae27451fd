"""Back into a quantized base: W + Σ w·s·L·R onto the base's own grid, in the base's own files.

Only codes change. Scales, zero points, headers, configs and every other byte stay the base's, so that
whatever loads the base loads the merge. What a code may be is the grid's affair (quantized/grid.py), with
its rules for nearest and dithered; here are the candidates with their error bounds, and the exact sums of
what these leave open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from safetensors import safe_open

from lorasmith.adapters.base import Change, RowUpdate
from lorasmith.checkpoint.header import TensorFile, TensorInfo
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import UsageError
from lorasmith.merging.disk import Finish, nothing_left
from lorasmith.merging.numbers.blocks import ROUNDED_UP, Counts, Products, merged_tensor, prepare_products
from lorasmith.merging.numbers.dither import ThresholdStream
from lorasmith.merging.numbers.exact import exact_values
from lorasmith.merging.numbers.rounding import Indices, not_finite
from lorasmith.merging.numbers.threads import Workers
from lorasmith.merging.plan import Output, Plan
from lorasmith.merging.tensors import Factors
from lorasmith.merging.writers import CalibratedTensors
from lorasmith.quantized.grid import Block, Codes, Ints, dithered, exact_places, nearest
from lorasmith.quantized.open import DecodedTensor, open_as_stored
from lorasmith.quantized.weight import QuantizedWeight
from lorasmith.records.merging import MergedTensor

BLOCK_ELEMENTS = 1 << 16
"""Elements whose dozen arrays of float64 are held at a time by each thread."""


def keep_format(plan: Plan, base: Checkpoint) -> tuple[Checkpoint, Plan]:
    """The base as it is stored, and the plan for its own tensors: codes for what changes, all else as it is.

    Raises `UsageError` for what has no place on a grid that is kept: another vocabulary, a head of its own.
    """
    if plan.untied or plan.vocabulary is not None:
        what = "a head of its own" if plan.untied else f"{plan.vocabulary} tokens"
        raise _refused(f"the adapter gives the model {what}, for which the base's format has no place")
    stored = open_as_stored(base.folder)
    planned = {output.name: output for output in plan.outputs}
    codes: dict[str, DecodedTensor] = {}
    for tensor in base.decoded.values():
        assert isinstance(tensor, DecodedTensor)
        codes[tensor.weight.parts["codes"].info.name] = tensor
    shards = {}
    for shard in stored.shards:
        outputs = []
        for info in shard.tensors.values():
            tensor_of_codes = codes.get(info.name)
            if tensor_of_codes is not None:
                change = planned[tensor_of_codes.weight.name].change
                decoded = tensor_of_codes if change is not None else None
                outputs.append(
                    Output(info.name, info.dtype, info.shape, info, change=change, decoded=decoded)
                )
                _require_update(tensor_of_codes.weight.name, change)
            else:
                plain = planned.get(info.name)
                outputs.append(plain or Output(info.name, info.dtype, info.shape, info))
        shards[shard.path.name] = tuple(_without_gaps(outputs, shard))
    return stored, replace(plan, shards=shards, keeps_format=True)


def _without_gaps(outputs: list[Output], shard: TensorFile) -> Iterator[Output]:
    """Outputs with what lies between them, as they are written one after the other: GGUF aligns tensors."""
    position = shard.data_start
    for output in outputs:
        if output.source.start > position:
            yield _bytes_of(shard, position, output.source.start)
        yield output
        position = output.source.stop
    if position < shard.size:
        yield _bytes_of(shard, position, shard.size)


def _bytes_of(shard: TensorFile, start: int, stop: int) -> Output:
    info = TensorInfo(f"bytes {start} to {stop} of {shard.path.name}", "U8", (stop - start,), start, stop)
    return Output(info.name, "U8", info.shape, info)


def _require_update(name: str, change: Change | None) -> None:
    if change is not None and (change.replacement or change.row_values or change.magnitude):
        how = "DoRA scales" if change.magnitude else "the adapter replaces"
        raise _refused(f"{how} {name}, whose numbers on the base's own scales would be others altogether")


def _refused(found: str) -> UsageError:
    return UsageError(found, expected="updates by products alone", remedy="merge with --into 16bit")


@dataclass(frozen=True)
class _Rows:
    """Rows of a unit that get the same products."""

    start: int
    stop: int
    update: RowUpdate


class GridWriter:
    """The stored codes of one weight, each that of the grid point that its merged number goes to."""

    def __init__(
        self,
        output: Output,
        factors: Factors,
        workers: Workers,
        stream: ThresholdStream | None,
        fallback: str = "",
    ) -> None:
        assert output.change is not None and isinstance(output.decoded, DecodedTensor)
        self._output = output
        self._change = output.change
        self._weight: QuantizedWeight = output.decoded.weight
        self._factors = factors
        self._workers = workers
        self._stream = stream
        self._fallback = fallback
        self._counts = Counts()
        self._width = self._weight.shape[-1]
        self._height = output.decoded.info.elements // self._width

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The bytes of unit after unit, with the number of the first stored element of each."""
        written = 0
        item = self._output.source.nbytes // max(1, self._output.source.elements)
        for start in range(0, self._height, self._weight.unit):
            stop = min(start + self._weight.unit, self._height)
            raw = bytearray(self._weight.encode(start, self._codes(start, stop)))
            yield written // item, torch.frombuffer(raw, dtype=torch.uint8)
            written += len(raw)
        if written != self._output.source.nbytes:
            raise AssertionError(f"{self._weight.name} has {written} bytes of codes")

    def piece(self, raw: torch.Tensor, first: int, out: torch.Tensor) -> Finish:
        """What `pieces` has made, as it is."""
        out.copy_(raw)
        return nothing_left

    def result(self) -> MergedTensor:
        """Formula and counts of the weight under its name in the model."""
        weight = self._weight
        named = replace(self._output, name=weight.name, shape=weight.shape, dtype=weight.format)
        rounding = "dithered" if self._stream else "nearest"
        return merged_tensor(named, self._change, self._counts, rounding, self._fallback)

    def _codes(self, start: int, stop: int) -> Codes:
        codes = np.empty((stop - start, self._width), dtype=np.uint8)
        ranges = list(self._ranges(start, stop))
        products: dict[int, Products] = {}
        for rows in ranges:
            if rows.update.terms and rows.update.start not in products:
                made = prepare_products(rows.update, self._factors)
                products[rows.update.start] = made
                self._counts.update_square += made.update_square if rows.start == rows.update.start else 0.0

        def work(rows: _Rows) -> Counts:
            block = self._weight.block(rows.start, rows.stop)
            own = products.get(rows.update.start)
            made, counts = (block.codes, Counts()) if own is None else self._round(block, rows.start, own)
            codes[rows.start - start : rows.stop - start] = made
            return counts

        for counts in self._workers.map(work, ranges):
            self._counts.add(counts)
        return codes

    def _ranges(self, start: int, stop: int) -> Iterator[_Rows]:
        """Blocks of rows that no update begins or ends within."""
        step = max(1, BLOCK_ELEMENTS // self._width)
        edges = {start, stop}
        for update in self._change.updates:
            edges |= {edge for edge in (update.start, update.stop) if start < edge < stop}
        for low in sorted(edges - {stop}):
            high = min(edge for edge in edges if edge > low)
            here = [update for update in self._change.updates if update.start <= low < update.stop]
            for first in range(low, high, step):
                yield _Rows(first, min(first + step, high), here[0] if here else RowUpdate(low, high, ()))

    def _round(self, block: Block, start: int, products: Products) -> tuple[Codes, Counts]:
        """The codes of some rows, and what became of their elements."""
        values = block.values
        if not np.isfinite(values).all():
            raise not_finite(self._weight.name)
        here = slice(start - products.start, start - products.start + len(values))
        x = torch.from_numpy(values.copy()).addmm_(products.left[here], products.right).numpy()
        bound = products.factor * ROUNDED_UP * (np.abs(x) + 2 * products.bound.numpy()[here])
        # Where a row's products are all zero nothing was added, and nothing rounded.
        bound = np.where(products.bound.numpy()[here] > 0, bound, 0.0)
        thresholds = None
        if self._stream is None:
            places, open_ = nearest(block, x, bound)
        else:
            taken = self._stream.take(start * self._width, x.size).reshape(x.shape)
            thresholds = taken
            places, open_ = dithered(block, x, bound, taken)
        ties = self._settle(block, places, np.nonzero(open_), here.start, products, thresholds)
        updated = x.size
        if products.updated is not None:
            updated = int(torch.count_nonzero(products.updated[here]))
        counts = Counts(
            changed=int(np.count_nonzero(places != block.places)),
            updated=updated,
            ties=ties,
            base_square=float(np.square(values).sum()),
        )
        return block.codes_at(places), counts

    def _settle(
        self,
        block: Block,
        places: Ints,
        open_: tuple[Indices, ...],
        first: int,
        products: Products,
        thresholds: Ints | None,
    ) -> int:
        """Decide what is open in rational numbers, in place; how many of it were ties."""
        rows, columns = open_
        if not len(rows):
            return 0
        one = block.cut(rows, columns)
        x: list[Fraction] = exact_values(one.values[0], products.exact_terms(first + rows, columns))
        own = None if thresholds is None else thresholds[rows, columns]
        places[rows, columns], ties = exact_places(one, x, places[rows, columns], own)
        return ties


class CalibratedGridWriter(GridWriter):
    """The codes that a fit has found for one weight."""

    def __init__(self, output: Output, factors: Factors, workers: Workers, fitted: CalibratedTensors) -> None:
        super().__init__(output, factors, workers, None)
        self._fitted = fitted
        changed, updated, base, update = fitted.counts[self._weight.name]
        self._counts = Counts(changed=changed, updated=updated, base_square=base, update_square=update)

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """All stored bytes of the weight at once."""
        with safe_open(self._fitted.files[self._weight.name], "pt") as stored:
            raw = stored.get_tensor(self._weight.name)
        if raw.numel() != self._output.source.nbytes:
            raise AssertionError(f"{self._weight.name} has {raw.numel()} bytes of codes")
        yield 0, raw

    def result(self) -> MergedTensor:
        """Formula and counts of the weight under its name in the model."""
        return super().result().model_copy(update={"rounding": "calibrated"})
