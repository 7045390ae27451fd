"""GGUF bases: names and rows as llama.cpp stores them, undone to those of the model.

llama.cpp turns the rows of q and k of llama models: a head's [2, dim / 2] becomes [dim / 2, 2], for its
rotary embedding. A row of the model is then another row of the file; the numbers are the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorasmith.checkpoint.header import TensorFile, TensorInfo, nbytes_of, read_object
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import CheckpointError
from lorasmith.quantized.gguf_file import GgufFile, GgufTensor, read_gguf
from lorasmith.quantized.gguf_types import BLOCK_TYPES, BlockType, Raw
from lorasmith.quantized.grid import Block, Codes, Ints
from lorasmith.quantized.weight import Part, QuantizedWeight

_TYPES = {one.number: one for one in BLOCK_TYPES}
_PLAIN = {0: "F32", 1: "F16", 30: "BF16", 28: "F64"}

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""ggml's names of architectures whose tensors the tables below name; Mistral and SmolLM2 are llamas to it."""
TURNED = ("llama",)
"""Architectures whose q and k rows the conversion turns."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
RECOMPUTED = frozenset({"rope_freqs.weight"})
"""Tensors for llama.cpp alone, which the model computes from its config."""
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no safetensors; None where there is none.

    Raises `CheckpointError` where there are several: variants of a model, or its parts.
    """
    if not folder.is_dir() or any(folder.glob("model*.safetensors*")):
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(
            f"the folder holds {len(files)} GGUF files, such as {files[0].name} and {files[1].name}",
            where=folder,
            expected="one file with the whole model",
            remedy="keep one in a folder of its own; llama.cpp joins the parts of one with llama-gguf-split",
        )
    return files[0] if files else None


def model_name(name: str) -> str | None:
    """What a tensor is called in the model; None for one that it has not."""
    block = _BLOCK.fullmatch(name)
    if block is not None:
        number, module, leaf = block.groups()
        return f"model.layers.{number}.{_BLOCK_NAMES[module]}.{leaf}" if module in _BLOCK_NAMES else None
    module, _, leaf = name.rpartition(".")
    return f"{_NAMES[module]}.{leaf}" if module in _NAMES else None


@dataclass(frozen=True)
class GgufWeight:
    """A weight in one of ggml's block types."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    type: BlockType
    heads: int = 0
    """Heads whose rows are turned; 0 where none are."""

    @property
    def format(self) -> str:
        """The name of the type."""
        return f"gguf {self.type.name}"

    @property
    def unit(self) -> int:
        """All rows."""
        return math.prod(self.shape[:-1])

    def block(self, start: int, stop: int) -> Block:
        """Codes and grid of some rows."""
        rows = self._stored_rows(np.arange(start, stop))
        low = int(rows.min())
        raw = self._read(low, int(rows.max()) + 1)
        codes = self.type.codes(raw).reshape(-1, self.shape[-1])[rows - low]
        scale, offset = self.type.scales(raw)
        if not np.isfinite(scale).all() or (offset is not None and not np.isfinite(offset).all()):
            raise self.parts["codes"].refuse("it holds NaN or infinite scales", "finite scales")
        spread = (len(raw), self.type.elements)
        scale = np.broadcast_to(scale, spread).reshape(-1, self.shape[-1])[rows - low]
        if offset is not None:
            offset = np.broadcast_to(offset, spread).reshape(-1, self.shape[-1])[rows - low]
        return Block(self.type.levels, codes, scale, offset)

    def encode(self, start: int, codes: Codes) -> bytes:
        """The stored bytes with other codes in them."""
        raw = self._read(0, self.unit).copy()
        turned = np.empty_like(codes)
        turned[self._stored_rows(np.arange(self.unit))] = codes
        self.type.put(raw, turned.reshape(-1, self.type.elements))
        return raw.tobytes()

    def library(self, start: int, stop: int) -> torch.Tensor:
        """gguf-py: float32, which its products and sums round once."""
        return torch.from_numpy(self.block(start, stop).values.astype(np.float32))

    def _read(self, start: int, stop: int) -> Raw:
        """The blocks of some rows of the file, [N, size]."""
        per_row = self.shape[-1] // self.type.elements * self.type.size
        raw = self.parts["codes"].read(start * per_row, (stop - start) * per_row)
        return raw.reshape(-1, self.type.size)

    def _stored_rows(self, rows: Ints) -> Ints:
        """Rows of the file that rows of the model stand in."""
        if not self.heads:
            return rows
        size = self.shape[0] // self.heads
        head, inner = rows // size, rows % size
        half, place = inner // (size // 2), inner % (size // 2)
        return head * size + 2 * place + half


def open_gguf(path: Path) -> tuple[Checkpoint, list[QuantizedWeight]]:
    """A GGUF file as a checkpoint of one shard, and its quantized weights.

    Raises `CheckpointError` for architectures, types and tensors that are not known here.
    """
    file = read_gguf(path)
    architecture = str(file.metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"the architecture of the GGUF file is {architecture!r}",
            where=path,
            expected=", ".join(ARCHITECTURES),
            remedy="give the model as safetensors",
        )
    infos: dict[str, TensorInfo] = {}
    weights: list[QuantizedWeight] = []
    for tensor in file.tensors:
        info, weight = _tensor(file, tensor, architecture)
        infos[info.name] = info
        if weight is not None:
            weights.append(weight)
    config = _config(path.parent, architecture)
    shard = TensorFile(path, file.size, file.data_start, infos)
    return Checkpoint(path.parent, config, (shard,), None), weights


def _config(folder: Path, architecture: str) -> dict[str, Any]:
    """The model's config where it lies beside the file, else what the file's architecture tells."""
    if (folder / "config.json").exists():
        return read_object(folder / "config.json", CheckpointError)
    return {"model_type": architecture}


def _tensor(file: GgufFile, tensor: GgufTensor, architecture: str) -> tuple[TensorInfo, GgufWeight | None]:
    name = model_name(tensor.name)
    kind = _TYPES.get(tensor.type)
    turned = architecture in TURNED and re.search(r"\.attn_[qk]\.", tensor.name) is not None
    if tensor.type in _PLAIN and not turned and (name or tensor.name in RECOMPUTED):
        dtype = _PLAIN[tensor.type]
        stop = tensor.start + nbytes_of(dtype, tensor.shape)
        _require_inside(file, tensor, stop)
        return TensorInfo(name or tensor.name, dtype, tensor.shape, tensor.start, stop), None
    columns = tensor.shape[-1] if tensor.shape else 0
    if kind is None or name is None or not columns or columns % kind.elements or len(tensor.shape) != 2:
        raise CheckpointError(
            f"the tensor {tensor.name} {list(tensor.shape)} has ggml's type {tensor.type}"
            + ("" if name else ", and no known place in the model"),
            where=file.path,
            expected="a matrix in " + ", ".join(one.name for one in BLOCK_TYPES),
            remedy="give the model as safetensors, or in another GGUF type",
        )
    size = math.prod(tensor.shape) // kind.elements * kind.size
    _require_inside(file, tensor, tensor.start + size)
    info = TensorInfo(tensor.name, "U8", (size,), tensor.start, tensor.start + size)
    heads = _heads(file, tensor, architecture) if turned else 0
    return info, GgufWeight(name, tensor.shape, {"codes": Part(file.path, info)}, kind, heads)


def _heads(file: GgufFile, tensor: GgufTensor, architecture: str) -> int:
    heads = file.metadata.get(f"{architecture}.attention.head_count")
    if ".attn_k." in tensor.name:
        heads = file.metadata.get(f"{architecture}.attention.head_count_kv", heads)
    if not isinstance(heads, int) or heads < 1 or tensor.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{tensor.name} has {tensor.shape[0]} rows, the metadata tells of {heads!r} heads",
            where=file.path,
            expected="rows of heads, whose order has to be undone",
        )
    return heads


def _require_inside(file: GgufFile, tensor: GgufTensor, stop: int) -> None:
    if stop > file.size:
        raise CheckpointError(
            f"the data of {tensor.name} ends at byte {stop}, the file has {file.size}",
            where=file.path,
            expected="a whole file",
            remedy="fetch it again",
        )
