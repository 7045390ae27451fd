"""Which file of a model or adapter folder is not there: the libraries that load it say so in their words."""

from __future__ import annotations

import json
from pathlib import Path

from lorasmith.errors import InputError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def absent_file(folder: Path) -> Path | None:
    """The first file that a model folder lacks: the folder itself, its config, its weights or one shard."""
    if not (folder / "config.json").is_file():
        return folder / "config.json" if folder.is_dir() else folder
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return next((shard for shard in _shards(index) if not shard.is_file()), None)
    if any((folder / name).is_file() for name in _WEIGHTS):
        return None
    return folder / _WEIGHTS[0]


def absent_adapter_file(folder: Path) -> Path | None:
    """The same for an adapter."""
    if not (folder / "adapter_config.json").is_file():
        return folder / "adapter_config.json" if folder.is_dir() else folder
    if any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
        return None
    return folder / _ADAPTER_WEIGHTS[0]


def absent(kind: type[InputError], what: str, file: Path) -> InputError:
    """The error for such a file of a `model` or an `adapter`, to be raised from what the library said."""
    return kind(
        f"a file of the {what} is not there",
        where=file,
        expected=f"a whole {what} folder that stays as it is while it is read",
        remedy="copy the file again, then give the same command",
    )


def _shards(index: Path) -> list[Path]:
    try:
        named = json.loads(index.read_bytes())["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError):  # a damaged index is told by who loads it
        return []
    return [index.with_name(str(name)) for name in sorted(set(named))]
