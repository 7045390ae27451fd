"""What every format of quantized weights offers: one interface, one file a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.checkpoint.header import TensorInfo
from lorasmith.checkpoint.model import Checkpoint, text_config
from lorasmith.errors import CheckpointError, os_errors
from lorasmith.files.inputs import open_input
from lorasmith.quantized.grid import Block, Codes, Levels

Array = npt.NDArray[Any]

_NUMPY: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "BF16": np.uint16,
}


@dataclass(frozen=True)
class Part:
    """A stored tensor that a weight is made from."""

    path: Path
    info: TensorInfo

    def read(self, first: int = 0, count: int | None = None) -> Array:
        """Elements from `first` on, flat, all by default; 8-bit floats as their bytes.

        bfloat16 comes as float32, which holds it exactly.
        """
        kind = np.dtype(_NUMPY[self.info.dtype])
        number = self.info.elements - first if count is None else count
        with os_errors(self.path, "read"), open_input(self.path) as handle:
            handle.seek(self.info.start + first * kind.itemsize)
            raw = handle.read(number * kind.itemsize)
        if len(raw) != number * kind.itemsize:
            raise CheckpointError("the file ended while it was read", where=self.path)
        values = np.frombuffer(raw, dtype=kind)
        if self.info.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def kept(self, first: int = 0, count: int | None = None) -> Array:
        """The same, kept for the next time: where a format lies across the rows, all rows need all."""
        state = self.path.stat()
        return _kept(self, first, count, (state.st_ino, state.st_size, state.st_mtime_ns))

    def scales(self, first: int = 0, count: int | None = None) -> Array:
        """Elements that are scales; `CheckpointError` for NaN and infinities."""
        values = self.read(first, count)
        if not np.isfinite(values).all():
            raise self.refuse("it holds NaN or infinite scales", "finite scales")
        return values

    def refuse(self, found: str, expected: str) -> CheckpointError:
        """An error that names this tensor."""
        return CheckpointError(
            f"the tensor {self.info.name}: {found}",
            where=self.path,
            expected=expected,
            remedy="the base is damaged, or of a format that is not known here: fetch it again",
        )


@lru_cache(maxsize=8)
def _kept(part: Part, first: int, count: int | None, state: tuple[int, int, int]) -> Array:
    return part.read(first, count)


class QuantizedWeight(Protocol):
    """One weight of the model, as a format stores it. Rows are those of the matrix [elements / n, n]."""

    @property
    def name(self) -> str:
        """What the weight is called in the model."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the model."""

    @property
    def format(self) -> str:
        """The format's name, such as `nf4`."""

    @property
    def parts(self) -> Mapping[str, Part]:
        """The stored tensors that belong to it, by what they are for; `codes` is one of them."""

    @property
    def unit(self) -> int:
        """How many rows `encode` takes at a time: all of a matrix, those of one expert of a stack."""

    def block(self, start: int, stop: int) -> Block:
        """Codes and grid of some rows.

        Raises `CheckpointError` for scales that are not finite and codes that are no number.
        """

    def encode(self, start: int, codes: Codes) -> bytes:
        """The bytes of the stored codes for one unit's rows, which begin at `start`; nothing else changes."""

    def library(self, start: int, stop: int) -> torch.Tensor:
        """Some rows as the format's own library computes them, in its own type."""


class Codec(Protocol):
    """A format: finds its weights in a checkpoint."""

    name: str

    def find(self, stored: Checkpoint) -> list[QuantizedWeight]:
        """The weights of this format; `CheckpointError` for one that is not whole or does not fit."""


def part(stored: Checkpoint, name: str, dtypes: tuple[str, ...], needed_by: str) -> Part:
    """A stored tensor by its name; `CheckpointError` where it is missing or of another type."""
    info = stored.tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"the quantized weight {needed_by} lacks its tensor {name}",
            where=stored.folder,
            expected="every tensor that the format stores for a weight",
            remedy="the base is incomplete: fetch it again",
        )
    found = Part(stored.shard_of(name).path, info)
    if info.dtype not in dtypes:
        raise found.refuse(f"its type is {info.dtype}", " or ".join(dtypes))
    return found


def optional(stored: Checkpoint, module: str, leaves: tuple[str, ...]) -> dict[str, Part]:
    """Tensors that may stand beside a weight and say nothing of its values, such as scales of activations."""
    names = {leaf: f"{module}.{leaf}" for leaf in leaves}
    return {
        leaf: Part(stored.shard_of(name).path, stored.tensors[name])
        for leaf, name in names.items()
        if name in stored.tensors
    }


def require_numbers(codes: Codes, levels: Levels, where: Part) -> None:
    """`CheckpointError` where a code stands for no number (NaN of an 8-bit float)."""
    if np.isnan(levels.table[codes]).any():
        raise where.refuse("it holds NaN", "finite weights")


_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def model_type(checkpoint: Checkpoint) -> str:
    """The type that a model computes in by its config, bfloat16 where that is silent."""
    for config in (checkpoint.config, text_config(checkpoint.config)):
        named = config.get("dtype") or config.get("torch_dtype")
        if isinstance(named, str) and named.removeprefix("torch.") in _TYPES:
            return _TYPES[named.removeprefix("torch.")]
    return "BF16"


def settings(stored: Checkpoint) -> dict[str, Any]:
    """The config's `quantization_config`; empty where there is none."""
    for config in (stored.config, text_config(stored.config)):
        found = config.get("quantization_config") or config.get("compression_config")
        if isinstance(found, dict):
            return found
    return {}
