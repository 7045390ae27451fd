"""A PEFT adapter folder on disk: its config and the headers of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorasmith.checkpoint.header import FLOATS, TensorFile, TensorInfo, read_header
from lorasmith.checkpoint.jsonfile import read_object
from lorasmith.checkpoint.peft_config import PeftConfig, parse_config
from lorasmith.errors import AdapterError, CheckpointError, os_errors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose config and header have been checked; no tensor data is read yet."""

    folder: Path
    config: PeftConfig
    file: TensorFile

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by the name they have on disk."""
        return dict(self.file.tensors)


def open_adapter(folder: Path) -> Adapter:
    """Read config and header of an adapter folder.

    Raises `AdapterError` for a folder that is none, pickled weights, a config that cannot be merged rightly,
    keys that do not begin as PEFT's do or still hold an adapter's name, and tensors that are not floats.
    """
    with os_errors(folder, "open the adapter"):
        if not folder.is_dir():
            raise AdapterError("there is no such adapter folder", where=folder, expected="a folder")
    if not (folder / CONFIG).exists():
        raise AdapterError(
            f"the folder holds no {CONFIG}",
            where=folder,
            expected=f"{CONFIG} and {WEIGHTS}, as PEFT saves them",
            remedy="give the folder that PEFT's save_pretrained wrote",
        )
    config = parse_config(read_object(folder / CONFIG, AdapterError), folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise _no_weights(folder)
    try:
        file = read_header(folder / WEIGHTS)
    except CheckpointError as error:
        raise AdapterError(
            error.found, where=error.where, expected=error.expected, remedy=error.remedy
        ) from error
    if not file.tensors:
        raise AdapterError("the adapter holds no tensors", where=file.path)
    for info in file.tensors.values():
        _check_tensor(info, file.path)
    return Adapter(folder, config, file)


def _check_tensor(info: TensorInfo, path: Path) -> None:
    if ".default." in info.name or info.name.endswith(".default"):
        raise AdapterError(
            f"the tensor {info.name!r} still carries the adapter's name `default`",
            where=path,
            expected="names as PEFT's save_pretrained writes them, such as …lora_A.weight",
            remedy="save the adapter with PEFT's save_pretrained; a raw state_dict is not an adapter file",
        )
    if not info.name.startswith(PREFIX):
        raise AdapterError(
            f"the tensor {info.name[:200]!r} does not begin with {PREFIX!r}",
            where=path,
            expected="names as PEFT's save_pretrained writes them",
            remedy="this file was not written by PEFT for a transformers model; convert it first",
        )
    if info.dtype not in FLOATS:
        raise AdapterError(
            f"the tensor {info.name!r} has the type {info.dtype}",
            where=path,
            expected="one of " + ", ".join(FLOATS),
        )


def _no_weights(folder: Path) -> AdapterError:
    if (folder / PICKLE).exists():
        return AdapterError(
            f"the adapter's weights are a pickle ({PICKLE}), which can run any code when it is loaded",
            where=folder,
            expected=WEIGHTS,
            remedy="load it once where you trust it and save it again with PEFT: it writes safetensors",
        )
    return AdapterError(f"the folder holds no {WEIGHTS}", where=folder, expected=f"{CONFIG} and {WEIGHTS}")
