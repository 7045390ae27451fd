"""Compressed folders: what tells transformers to multiply their integers out while it loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasmith.checkpoint.jsonfile import read_object
from lorasmith.errors import CheckpointError

_PACKED = "compressed-tensors"


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that has no other weights; its metadata stand for config.json."""
    files = sorted(folder.glob("*.gguf"))
    return files[0] if files and not (folder / "config.json").is_file() else None


def unpacking(folder: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a folder in GGUF or compressed-tensors; none for any other.

    The stored integers are multiplied out once. So the model computes with the weights that are stored, and
    what is measured on it is not the error of a kernel.
    """
    file = gguf_file(folder)
    if file is not None:
        from transformers import GgufConfig

        return {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    config = read_object(folder / "config.json", CheckpointError)
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict) and quantized.get("quant_method") == _PACKED:
        from transformers import CompressedTensorsConfig

        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return {}
