"""GGUF files that are damaged, hostile, or of an unknown kind: one message before a weight is read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lorasmith.errors import CheckpointError
from lorasmith.quantized.open import open_base
from tests.quantized.cases import write_gguf


def good(
    path: Path, *, name: str = "blk.0.attn_q.weight", kind: str = "Q8_0", architecture: str = "qwen2"
) -> Path:
    import gguf

    path.mkdir()
    values = np.ones((8, 64), dtype=np.float32)
    raw = values if kind == "F32" else gguf.quantize(values, getattr(gguf.GGMLQuantizationType, kind))
    write_gguf(path / "model.gguf", {name: (raw, kind)}, architecture, 4)
    return path


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    weight = open_base(good(tmp_path / "base")).decoded["model.layers.0.self_attn.q_proj.weight"]
    assert weight.format == "gguf q8_0"
    assert np.allclose(weight.rows(0, 8).numpy(), 1, rtol=1e-2)


Damage = Callable[[bytes], bytes]

DAMAGES: dict[str, Damage] = {
    "no GGUF": lambda content: b"GGML" + content[4:],
    "another version": lambda content: content[:4] + struct.pack("<I", 9) + content[8:],
    "2^60 tensors": lambda content: content[:8] + struct.pack("<Q", 1 << 60) + content[16:],
    "2^60 entries": lambda content: content[:16] + struct.pack("<Q", 1 << 60) + content[24:],
    "a text of 2^60 bytes": lambda content: content[:24] + struct.pack("<Q", 1 << 60) + content[32:],
    "a head that ends": lambda content: content[:100],
    "data that ends": lambda content: content[:-300],
    "nothing": lambda content: b"",
}


@pytest.mark.parametrize("damage", list(DAMAGES.values()), ids=list(DAMAGES))
def test_a_damaged_file_is_refused(damage: Damage, tmp_path: Path) -> None:
    file = good(tmp_path / "base") / "model.gguf"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        open_base(file.parent)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"architecture": "mamba"}, "architecture of the GGUF file is 'mamba'"),
        ({"kind": "Q5_0"}, "ggml's type 6"),
        ({"name": "blk.0.ffn_gate_exps.weight"}, "no known place"),
        ({"architecture": "llama", "kind": "F32"}, "ggml's type 0"),
    ],
)
def test_what_is_not_known_is_named(settings: dict[str, str], told: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=told):
        open_base(good(tmp_path / "base", **settings))


def test_two_files_in_a_folder_are_not_guessed_between(tmp_path: Path) -> None:
    base = good(tmp_path / "base")
    (base / "other.gguf").write_bytes((base / "model.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        open_base(base)
