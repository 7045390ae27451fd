"""A base as the merge sees it: quantized weights stand in it as the weights that they are in the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorasmith.checkpoint.header import FLOATS, TensorFile, TensorInfo
from lorasmith.checkpoint.model import Checkpoint, looks_quantized, open_stored, refuse_quantized
from lorasmith.errors import CheckpointError
from lorasmith.files.inputs import require_own_links
from lorasmith.quantized.gguf import RECOMPUTED, gguf_file, open_gguf
from lorasmith.quantized.registry import CODECS
from lorasmith.quantized.weight import QuantizedWeight, model_type

_STEP = 1 << 16
"""Elements decoded together: the arrays of a step stay near a core, and memory small."""


@dataclass(frozen=True)
class DecodedTensor:
    """A weight decoded as it is read, with the methods of a tensor on disk."""

    weight: QuantizedWeight
    info: TensorInfo
    """Its entry in the checkpoint: float64, at no place of the file."""
    dtype: str
    """The type that the model has it in."""

    @property
    def format(self) -> str:
        """The name of the format that it is stored in."""
        return self.weight.format

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.info.shape[-1]

    @property
    def path(self) -> Path:
        """The file with its codes."""
        return self.weight.parts["codes"].path

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Whole rows as a float64 matrix."""
        values = torch.empty(stop - start, self.width, dtype=torch.float64)
        step = max(1, _STEP // self.width)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values[first - start : last - start] = torch.from_numpy(self.weight.block(first, last).values)
        return values

    def read(self, first: int, count: int) -> torch.Tensor:
        """The elements from `first` on, flat."""
        begin, end = first // self.width, -(-(first + count) // self.width)
        flat = self.rows(begin, end).reshape(-1)
        return flat[first - begin * self.width :][:count]


def open_base(folder: Path) -> Checkpoint:
    """A base in any known format; `decoded` of the checkpoint holds what is quantized.

    Raises `CheckpointError` for a format that is not known, and for weights that are not whole.
    """
    stored, weights = _open(folder)
    if not weights:
        _require_plain(stored)
        return stored
    return logical(stored, weights)


def _require_plain(stored: Checkpoint) -> None:
    """`CheckpointError` for a base that looks quantized, and holds no weight of a known format."""
    try:
        refuse_quantized(stored)
    except CheckpointError as error:
        names = sorted({codec.name for codec in CODECS})
        raise CheckpointError(
            error.found,
            where=error.where,
            expected="weights in a format that is known here: " + ", ".join(names) + ", GGUF",
            remedy="give the 16-bit model that this one was quantized from",
        ) from error


def open_as_stored(folder: Path) -> Checkpoint:
    """A base with the tensors that its files hold."""
    return _open(folder)[0]


def _open(folder: Path) -> tuple[Checkpoint, list[QuantizedWeight]]:
    file = gguf_file(folder)
    if file is not None:
        require_own_links(folder)
        return open_gguf(file)
    stored = open_stored(folder)
    return stored, [weight for codec in CODECS for weight in codec.find(stored)]


def logical(stored: Checkpoint, weights: list[QuantizedWeight]) -> Checkpoint:
    """The checkpoint with a float64 entry for every quantized weight in the place of its parts."""
    owner = _owners(stored, weights)
    dtype = model_type(stored)
    decoded: dict[str, DecodedTensor] = {}
    shards = []
    for shard in stored.shards:
        tensors: dict[str, TensorInfo] = {}
        for name, info in shard.tensors.items():
            weight = owner.get(name)
            if name in RECOMPUTED:
                continue
            if weight is None:
                tensors[name] = info
            elif name == weight.parts["codes"].info.name:
                place = weight.parts["codes"].info
                entry = TensorInfo(weight.name, "F64", weight.shape, place.start, place.start)
                tensors[weight.name] = entry
                decoded[weight.name] = DecodedTensor(weight, entry, dtype)
        shards.append(TensorFile(shard.path, shard.size, shard.data_start, tensors))
    _require_all_known(stored, weights, owner)
    return replace(stored, shards=tuple(shards), decoded=decoded)


def _require_all_known(
    stored: Checkpoint, weights: list[QuantizedWeight], owner: dict[str, QuantizedWeight]
) -> None:
    """`CheckpointError` for a quantized tensor that is no part of a weight: nothing is merged by half."""
    modules = {weight.name.rpartition(".")[0] for weight in weights}
    for name, info in stored.tensors.items():
        module, _, leaf = name.rpartition(".")
        companion = module in modules and (info.dtype not in FLOATS or leaf.startswith("weight_"))
        if name not in owner and (companion or looks_quantized(info)):
            raise CheckpointError(
                f"the base holds {name} ({info.dtype}), which is no part of any weight in a known format",
                where=stored.folder,
                expected="one format, and tensors that it knows: " + ", ".join(sorted(_names(weights))),
                remedy="the base is of a variant of its format that is not known here, or mixes two",
            )


def _names(weights: list[QuantizedWeight]) -> set[str]:
    return {weight.format for weight in weights}


def _owners(stored: Checkpoint, weights: list[QuantizedWeight]) -> dict[str, QuantizedWeight]:
    owner: dict[str, QuantizedWeight] = {}
    for weight in weights:
        for part in weight.parts.values():
            if owner.setdefault(part.info.name, weight) is not weight:
                raise CheckpointError(
                    f"two quantized weights, {weight.name} and {owner[part.info.name].name}, share "
                    f"{part.info.name}",
                    where=stored.folder,
                    expected="tensors that belong to one weight",
                )
    return owner


def formats(checkpoint: Checkpoint) -> str:
    """What is quantized in a base, in words: `210 weights in nf4`."""
    counts = Counter(tensor.format for tensor in checkpoint.decoded.values())
    return ", ".join(f"{count} weights in {name}" for name, count in sorted(counts.items()))
