"""GGUF: the container by gguf-py's reader, block types, names and turned rows by code of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorasmith.errors import CheckpointError, MachineError
from lorasmith.proving.weights.model_folder import ProvenFile, ProvenTensor, TensorFolder
from lorasmith.proving.weights.quantized.stored import Elements, Found

Unpacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes, scales and shifts of blocks, all [N, elements]."""

_MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA_ONLY = "rope_freqs.weight"
"""Computed by the model from its config."""


@dataclass
class GgufFolder:
    """A GGUF file: all its tensors, and the weights that are quantized."""

    folder: TensorFolder
    architecture: str
    found: dict[str, Found] = field(default_factory=dict)


def gguf_in(path: Path) -> Path | None:
    """The one GGUF file of a folder without safetensors."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not any(path.glob("model*.safetensors*")) else []
    return files[0] if len(files) == 1 else None


def open_gguf(file: Path) -> GgufFolder:
    """Raises `MachineError` without gguf-py, `CheckpointError` for a file that it cannot read."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MachineError(
            "proving a GGUF base needs gguf", remedy="pip install 'lorasmith[compress]'"
        ) from error
    try:
        reader = GGUFReader(file)
        fields = {
            key: _content(reader.fields[key]) for key in reader.fields if not key.startswith("tokenizer")
        }
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(f"gguf cannot read it: {error}", where=file, expected="a GGUF file") from error
    architecture = str(fields.get("general.architecture"))
    opened = GgufFolder(TensorFolder(file.parent), architecture)
    proven = ProvenFile(file)
    opened.folder.files.append(proven)
    position = 0
    for tensor in sorted(reader.tensors, key=lambda one: int(one.data_offset)):
        start, size = int(tensor.data_offset), int(tensor.n_bytes)
        # Head and gaps are the base's too: bytes that a merge into the same format takes over.
        _add_bytes(opened.folder, proven, position, start)
        position = start + size
        _add(opened, proven, tensor, fields)
    _add_bytes(opened.folder, proven, position, proven.size)
    return opened


def _content(one: Any) -> Any:
    return one.contents() if len(one.data) == 1 else None


def _add_bytes(folder: TensorFolder, file: ProvenFile, start: int, stop: int) -> None:
    if stop > start:
        name = f"bytes {start} to {stop} of {file.path.name}"
        folder.tensors[name] = ProvenTensor(file, start, name, "U8", (stop - start,))


def _add(opened: GgufFolder, file: ProvenFile, tensor: Any, fields: dict[str, Any]) -> None:
    name, kind = str(tensor.name), str(tensor.tensor_type.name)
    shape = tuple(int(extent) for extent in reversed(tensor.shape))
    start, size = int(tensor.data_offset), int(tensor.n_bytes)
    if kind in ("F32", "F16", "BF16", "F64"):
        own = _name(name) or name
        opened.folder.tensors[own] = ProvenTensor(file, start, own, kind, shape)
        return
    if kind not in BLOCKS or _name(name) is None:
        raise CheckpointError(f"{name!r} is in {kind}", where=file.path, expected=", ".join(BLOCKS))
    raw = ProvenTensor(file, start, name, "U8", (size,))
    opened.folder.tensors[name] = raw
    turned = opened.architecture == "llama" and (".attn_q." in name or ".attn_k." in name)
    key = "head_count_kv" if ".attn_k." in name else "head_count"
    heads = int(fields[f"{opened.architecture}.attention.{key}"]) if turned else 0
    blocks = BLOCKS[kind]
    found = Found(
        name=str(_name(name)),
        shape=shape,
        format="gguf " + kind.lower().replace("_k", "_K"),
        codes=raw,
        levels=blocks.levels,
        read=_reader(raw, shape, blocks, _rows(shape[0], heads)),
        used=(name,),
        block=(blocks.size, *blocks.codes),
    )
    opened.found[found.name] = found


def _name(name: str) -> str | None:
    if name.startswith("blk."):
        _, number, module, leaf = name.split(".")
        return f"model.layers.{number}.{_MODULES[module]}.{leaf}" if module in _MODULES else None
    module, _, leaf = name.rpartition(".")
    return f"{_OUTSIDE[module]}.{leaf}" if module in _OUTSIDE else None


def is_recomputed(name: str) -> bool:
    """Whether a tensor is for llama.cpp alone, or no tensor at all but the bytes between them."""
    return name == _LLAMA_ONLY or name.startswith("bytes ")


def _rows(count: int, heads: int) -> torch.Tensor:
    """Row of the file for each row of the model: a head's pairs lie side by side there."""
    rows = torch.arange(count)
    return rows.reshape(heads, -1, 2).transpose(1, 2).reshape(-1) if heads else rows


@dataclass(frozen=True)
class Blocks:
    """A block type."""

    elements: int
    size: int
    codes: tuple[int, int]
    """First byte of the codes, and first byte after them."""
    levels: torch.Tensor
    unpack: Callable[[torch.Tensor], Unpacked]


def _reader(
    raw: ProvenTensor, shape: tuple[int, ...], blocks: Blocks, rows: torch.Tensor
) -> Callable[[int, int], Elements]:
    columns = shape[-1]
    per_row = columns // blocks.elements * blocks.size

    def read(first: int, count: int) -> Elements:
        low, high = first // columns, (first + count - 1) // columns + 1
        wanted = rows[low:high]
        begin, end = int(wanted.min()), int(wanted.max()) + 1
        stored = raw.flat(begin * per_row, (end - begin) * per_row).reshape(-1, blocks.size)
        skipped = first - low * columns
        parts = [
            None if part is None else part.reshape(-1, columns)[wanted - begin].reshape(-1)[skipped:][:count]
            for part in blocks.unpack(stored)
        ]
        assert parts[0] is not None and parts[1] is not None
        return Elements(parts[0], parts[1], parts[2])

    return read


def _f16(raw: torch.Tensor, at: int) -> torch.Tensor:
    return raw[:, at : at + 2].contiguous().view(torch.float16).double()


def _pairs(raw: torch.Tensor, at: int, run: int, count: int) -> torch.Tensor:
    """Low halves of `run` bytes, then their high ones, and so on over `count` bytes."""
    packed = raw[:, at : at + count].long().split(run, dim=1)
    return torch.cat([half for part in packed for half in (part % 16, part // 16)], dim=1)


def _one_scale(codes_at: int, least_at: int | None) -> Callable[[torch.Tensor], Unpacked]:
    def unpack(raw: torch.Tensor) -> Unpacked:
        codes = _pairs(raw, codes_at, 16, 16)
        shift = None if least_at is None else _f16(raw, least_at).expand(codes.shape)
        return codes, _f16(raw, 0).expand(codes.shape), shift

    return unpack


def _q8(raw: torch.Tensor) -> Unpacked:
    codes = raw[:, 2:34].long()
    return codes, _f16(raw, 0).expand(codes.shape), None


def _mx(raw: torch.Tensor) -> Unpacked:
    codes = _pairs(raw, 1, 16, 16)
    return codes, torch.pow(2.0, raw[:, :1].double() - 128).expand(codes.shape), None


def _k(codes_at: int, high_at: int | None) -> Callable[[torch.Tensor], Unpacked]:
    """q4_K and q5_K: eight runs of 32, each with six bits of scale and six of minimum."""

    def unpack(raw: torch.Tensor) -> Unpacked:
        codes = _pairs(raw, codes_at, 32, 128)
        packed = raw[:, 4:16].long()
        scales, least = [], []
        for j in range(8):
            if j < 4:
                scales.append(packed[:, j] & 63)
                least.append(packed[:, j + 4] & 63)
            else:
                scales.append((packed[:, j + 4] & 15) | (packed[:, j - 4] >> 6 << 4))
                least.append((packed[:, j + 4] >> 4) | (packed[:, j] >> 6 << 4))
        if high_at is not None:
            bits = raw[:, high_at : high_at + 32].long()
            codes = codes + 16 * torch.cat([bits >> j & 1 for j in range(8)], dim=1)
        scale = _f16(raw, 0) * torch.stack(scales, dim=1)
        shift = -(_f16(raw, 2) * torch.stack(least, dim=1))
        return codes, scale.repeat_interleave(32, dim=1), shift.repeat_interleave(32, dim=1)

    return unpack


def _q6(raw: torch.Tensor) -> Unpacked:
    low = _pairs(raw, 0, 64, 128)
    high = raw[:, 128:192].long().split(32, dim=1)
    upper = torch.cat([part >> shift & 3 for part in high for shift in (0, 2, 4, 6)], dim=1)
    scale = _f16(raw, 208) * raw[:, 192:208].contiguous().view(torch.int8)
    return low + 16 * upper, scale.repeat_interleave(16, dim=1), None


def _counted(first: int, stop: int) -> torch.Tensor:
    return torch.arange(first, stop, dtype=torch.float64)


_MX_LEVELS = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.float64)

BLOCKS = {
    "Q4_0": Blocks(32, 18, (2, 18), _counted(-8, 8), _one_scale(2, None)),
    "Q4_1": Blocks(32, 20, (4, 20), _counted(0, 16), _one_scale(4, 2)),
    "Q8_0": Blocks(32, 34, (2, 34), torch.cat([_counted(0, 128), _counted(-128, 0)]), _q8),
    "Q4_K": Blocks(256, 144, (16, 144), _counted(0, 16), _k(16, None)),
    "Q5_K": Blocks(256, 176, (16, 176), _counted(0, 32), _k(48, 16)),
    "Q6_K": Blocks(256, 210, (0, 192), _counted(-32, 32), _q6),
    "MXFP4": Blocks(32, 17, (1, 17), _MX_LEVELS, _mx),
}
"""By gguf-py's names of the types."""
