"""A model folder on disk: config, shards, and where each tensor lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from lorasmith.checkpoint.header import TensorFile, TensorInfo, read_header, read_object
from lorasmith.errors import CheckpointError, os_errors
from lorasmith.files.inputs import require_own_links

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_QUANTIZED_DTYPES = (
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
)
_QUANTIZED_SUFFIXES = (".qweight", ".qzeros", ".absmax", ".quant_map", "_scale_inv", ".SCB", ".weight_packed")


if TYPE_CHECKING:
    import torch


class Decoded(Protocol):
    """A weight that is decoded from several stored tensors as it is read."""

    @property
    def info(self) -> TensorInfo:
        """Its entry in the checkpoint: float64, at no place of the file."""

    @property
    def dtype(self) -> str:
        """The type that the model has it in."""

    @property
    def format(self) -> str:
        """The name of the format that it is stored in."""

    @property
    def width(self) -> int:
        """Columns of the matrix."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Whole rows as a float64 matrix."""

    def read(self, first: int, count: int) -> torch.Tensor:
        """The elements from `first` on, flat, in float64."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers and index have been checked; no tensor data is read yet."""

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[TensorFile, ...]
    """The files that hold its tensors, in the order of their names."""
    index: Mapping[str, Any] | None
    """The shard index as it is on disk, or None for a single file."""
    decoded: Mapping[str, Decoded] = field(default_factory=dict)
    """The quantized weights among its tensors, where it was opened for their sake (`quantized/open.py`)."""

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name."""
        return {name: info for shard in self.shards for name, info in shard.tensors.items()}

    def shard_of(self, name: str) -> TensorFile:
        """The file that holds a tensor; KeyError if none does."""
        for shard in self.shards:
            if name in shard.tensors:
                return shard
        raise KeyError(name)

    @property
    def architecture(self) -> str:
        """The class name that the config gives, or its model type."""
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else self.config.get("model_type", "unknown")
        return str(first)

    @property
    def tied(self) -> bool:
        """Whether the output head shares the embedding's tensor.

        The config says so; where it is silent (its class has a default), a folder without a head is tied.
        """
        for part in (self.config, text_config(self.config)):
            if isinstance(part.get("tie_word_embeddings"), bool):
                return bool(part["tie_word_embeddings"])
        return not any(name in self.tensors for name in HEAD_NAMES)

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data, as the index's `total_size` counts."""
        return sum(info.nbytes for info in self.tensors.values())


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language part of a config; the config itself where there is no other part."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


HEAD_NAMES = ("lm_head.weight", "embed_out.weight", "output.weight", "language_model.lm_head.weight")
"""What output heads are called on disk."""


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config, index and all headers of a model folder; `CheckpointError` for a quantized model too."""
    checkpoint = open_stored(folder)
    refuse_quantized(checkpoint)
    return checkpoint


def open_stored(folder: Path) -> Checkpoint:
    """Read config, index and all headers of a model folder, whatever its tensors hold.

    Raises `CheckpointError` for a folder without safetensors weights, an index that names missing files,
    files outside the folder or tensors that are not there, or a doubled tensor.
    """
    with os_errors(folder, "open the model"):
        if not folder.is_dir():
            raise CheckpointError("there is no such model folder", where=folder, expected="a folder")
    require_own_links(folder)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise CheckpointError(
            "this is an adapter folder, not a model", where=folder, remedy="give the base model here"
        )
    config = read_object(folder / "config.json", CheckpointError)
    # The single file first, as transformers loads it, whatever index lies beside it.
    if (folder / SINGLE).exists():
        index = None
        files: dict[str, set[str] | None] = {SINGLE: None}
    elif (folder / INDEX).exists():
        index = read_object(folder / INDEX, CheckpointError)
        files = _files_of_index(index, folder)
    else:
        raise _no_weights(folder)
    shards = tuple(_open_shard(folder, name, expected) for name, expected in sorted(files.items()))
    checkpoint = Checkpoint(folder, config, shards, index)
    if len(checkpoint.tensors) != sum(len(shard.tensors) for shard in shards):
        raise _doubled(shards, folder)
    return checkpoint


def _files_of_index(index: Mapping[str, Any], folder: Path) -> dict[str, set[str] | None]:
    where = folder / INDEX
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "the index has no weight_map", where=where, expected='"weight_map": {tensor: file}'
        )
    files: dict[str, set[str] | None] = {}
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or name in ("", ".", "..")
            or PurePosixPath(name).name != name
            or "\\" in name
        ):
            raise CheckpointError(
                f"the index places {tensor!r} in {str(name)[:120]!r}",
                where=where,
                expected="names of files in the same folder",
                remedy="do not use this model: its index points outside its folder",
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"the index names {name!r}", where=where, expected="*.safetensors files")
        names = files.setdefault(name, set())
        if names is not None:
            names.add(tensor)
    return files


def _open_shard(folder: Path, name: str, expected: set[str] | None) -> TensorFile:
    path = folder / name
    if not path.exists():
        raise CheckpointError(
            f"the index names the shard {name}, which is missing",
            where=folder,
            remedy="fetch the missing file; the download may have stopped half-way",
        )
    shard = read_header(path)
    missing = sorted((expected or set()) - set(shard.tensors))
    if missing:
        raise CheckpointError(
            f"the index places {missing[0]!r} in this shard, which does not hold it"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""),
            where=path,
            remedy="fetch shard and index again: they are not of the same model",
        )
    return shard


def _doubled(shards: tuple[TensorFile, ...], folder: Path) -> CheckpointError:
    seen: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in seen:
                return CheckpointError(
                    f"the tensor {name!r} is in {seen[name]} and in {shard.path.name}",
                    where=folder,
                    expected="each tensor once",
                )
            seen[name] = shard.path.name
    raise AssertionError("no tensor is doubled")


def looks_quantized(info: TensorInfo) -> bool:
    """Whether a tensor by its type or its name is of a quantized model."""
    return info.dtype in _QUANTIZED_DTYPES or info.name.endswith(_QUANTIZED_SUFFIXES)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for a model whose config or tensors say that it is quantized."""
    folder = checkpoint.folder
    for part in (checkpoint.config, text_config(checkpoint.config)):
        quantization = part.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise _quantized(folder, f"its config says quantization_config ({method or 'unnamed method'})")
    for name, info in checkpoint.tensors.items():
        if looks_quantized(info):
            raise _quantized(folder, f"it holds the tensor {name}, of the type {info.dtype}")


def _quantized(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"the base is quantized: {why}",
        where=folder,
        expected="a base in 16 or 32 bits",
        remedy="give the 16-bit model that this one was quantized from, or a merge of this one: "
        "`lorasmith merge --into 16bit` and `prove` take quantized bases",
    )


def _no_weights(folder: Path) -> CheckpointError:
    others = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
    )
    if others:
        return CheckpointError(
            f"the folder holds {others[0]}, but no safetensors weights",
            where=folder,
            expected=f"{SINGLE} or {INDEX}",
            remedy="save the model as safetensors (transformers: save_pretrained); pickles are never loaded",
        )
    return CheckpointError("the folder holds no weights", where=folder, expected=f"{SINGLE} or {INDEX}")
