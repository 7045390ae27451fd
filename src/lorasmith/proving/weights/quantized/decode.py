"""A base's quantized weights put in the place of the tensors that they are stored as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lorasmith.proving.weights.model_folder import ProvenTensor, TensorFolder
from lorasmith.proving.weights.quantized.bitsandbytes import find_4bit, find_8bit
from lorasmith.proving.weights.quantized.floats import find_fp8, find_mxfp4, find_nvfp4
from lorasmith.proving.weights.quantized.gguf import is_recomputed
from lorasmith.proving.weights.quantized.integers import find_compressed, find_qweight
from lorasmith.proving.weights.quantized.stored import Found

Finder = Callable[[Mapping[str, ProvenTensor], Mapping[str, Any]], list[Found]]

FINDERS: tuple[Finder, ...] = (
    find_4bit,
    find_8bit,
    find_fp8,
    find_mxfp4,
    find_nvfp4,
    find_compressed,
    find_qweight,
)
"""One a format: what it finds among a base's tensors, given its config."""

_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def find_weights(tensors: Mapping[str, ProvenTensor], config: Mapping[str, Any]) -> dict[str, Found]:
    """The quantized weights among stored tensors, by their names in the model."""
    found = [one for finder in FINDERS for one in finder(tensors, config)]
    return {one.name: one for one in found}


def put_in_place(folder: TensorFolder, found: Mapping[str, Found], config: Mapping[str, Any]) -> None:
    """Let `folder.tensors` hold the weights instead of what they are stored as."""
    dtype = _model_dtype(config)
    in_place = {one.codes.name: one for one in found.values()}
    used = {name for one in found.values() for name in one.used}
    tensors: dict[str, ProvenTensor] = {}
    for name, stored in folder.tensors.items():
        if name in in_place:
            one = in_place[name]
            tensors[one.name] = replace(
                stored, name=one.name, dtype="F64", shape=one.shape, decode=one.decode, model_dtype=dtype
            )
        elif name not in used and not is_recomputed(name):
            tensors[name] = stored
    folder.tensors = tensors


def _model_dtype(config: Mapping[str, Any]) -> str:
    """The type that the model computes in, as its config says; bfloat16 where it is silent."""
    for part in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            value = part.get(key) if isinstance(part, dict) else None
            if isinstance(value, str) and value.removeprefix("torch.") in _TYPES:
                return _TYPES[value.removeprefix("torch.")]
    return "BF16"
