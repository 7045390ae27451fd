"""Stored tensors as the merge reads them: the base's in stretches, an adapter's factors whole, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lorasmith.adapters.base import Copy, Factor
from lorasmith.adapters.bias import UNIT
from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.header import ITEM_BITS, TensorInfo
from lorasmith.checkpoint.model import Checkpoint, Decoded
from lorasmith.checkpoint.values import TORCH_TYPES, read_tensor
from lorasmith.errors import AdapterError, os_errors
from lorasmith.files.inputs import open_input
from lorasmith.merging.numbers.rounding import TARGETS, cast

_RECENT = 4
"""Adapter tensors that stay in memory: the two factors of a stack of experts, and those of the next."""
_STEP = 1 << 22
"""Elements that are compared at a time."""

_LARGEST_FACTOR = 2.0**128
_SMALLEST_FACTOR = 2.0**-150


class TensorOnDisk:
    """A tensor on disk, read in stretches."""

    def __init__(self, path: Path, info: TensorInfo) -> None:
        self.path = path
        self.info = info
        self.width = info.shape[-1] if len(info.shape) > 1 else 1

    def read(self, first: int, count: int) -> torch.Tensor:
        """The elements from `first` on, flat."""
        size = ITEM_BITS[self.info.dtype] // 8
        with os_errors(self.path, "read"), open_input(self.path) as handle:
            handle.seek(self.info.start + first * size)
            raw = bytearray(handle.read(count * size))
        return torch.frombuffer(raw, dtype=TORCH_TYPES[self.info.dtype])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Whole rows of the tensor as a matrix."""
        return self.read(start * self.width, (stop - start) * self.width).view(stop - start, self.width)


StoredTensor = TensorOnDisk | Decoded
"""A tensor of the base, stored as numbers or quantized."""


def stored_tensor(base: Checkpoint, name: str) -> StoredTensor:
    """A tensor of the base to read from."""
    return base.decoded.get(name) or TensorOnDisk(base.shard_of(name).path, base.tensors[name])


class Factors:
    """Reads adapter tensors as float64 matrices."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters
        self._recent: dict[tuple[int, str], torch.Tensor] = {}

    def __call__(self, factor: Factor) -> torch.Tensor:
        """A factor in float64; `AdapterError` naming the tensor for NaN, infinite or absurd ones."""
        # A bias is the product of its column and the matrix [[1]], which no adapter stores.
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


# Is this the base that the adapter was trained on? An adapter that keeps a copy of a weight can tell.


def check_copies(copies: Sequence[Copy], base: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Raise `AdapterError` unless every copy that an adapter keeps equals the base's tensor.

    A copy of a lower precision must be the base's values rounded to it, and the other way round.
    """
    for kept_copy in copies:
        adapter = adapters[kept_copy.adapter]
        kept = TensorOnDisk(adapter.file.path, adapter.file.tensors[kept_copy.tensor])
        other: StoredTensor
        if kept_copy.base is not None:
            other = stored_tensor(base, kept_copy.base)
        else:
            other = TensorOnDisk(adapter.file.path, adapter.file.tensors[str(kept_copy.twin)])
        common = min(kept.info.elements, other.info.elements)
        for first in range(0, common, _STEP):
            count = min(_STEP, common - first)
            if not _agree(
                kept.read(first, count), kept.info.dtype, other.read(first, count), other.info.dtype
            ):
                raise _differs(kept_copy, adapter)


def _differs(copy: Copy, adapter: Adapter) -> AdapterError:
    if copy.base is None:
        return AdapterError(
            f"the adapter stores {copy.twin} twice, with different values",
            where=adapter.file.path,
            expected=f"{copy.tensor} equal to it",
            remedy="save the adapter again",
        )
    return AdapterError(
        f"the adapter's copy of {copy.base} differs from this base's",
        where=adapter.file.path,
        expected="the base that the adapter was trained on",
        remedy="give the model that adapter_config.json names as its base",
    )


def _agree(kept: torch.Tensor, kept_type: str, given: torch.Tensor, given_type: str) -> bool:
    if torch.equal(kept.to(torch.float64), given.to(torch.float64)):
        return True
    down = kept_type in TARGETS and torch.equal(cast(given, TARGETS[kept_type]), kept)
    up = given_type in TARGETS and torch.equal(cast(kept, TARGETS[given_type]), given)
    return down or up
