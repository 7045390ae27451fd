"""A quantized model with its weights decoded: the numbers an adapter was trained on, and a merge adds to.

transformers would load such a folder through its format's own library. Many machines lack that or cannot run
it, and what it computes with depends on its kernels. Here each weight is decoded exactly at the moment when
transformers takes it, then rounded to the type that the model computes in. So no more is in memory than for a
16-bit model of the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasmith.checkpoint.header import TensorFile, TensorInfo, read_object
from lorasmith.checkpoint.model import Checkpoint, text_config
from lorasmith.checkpoint.values import read_tensor
from lorasmith.errors import CheckpointError
from lorasmith.quantized.gguf import gguf_file
from lorasmith.quantized.open import open_base


@dataclass(frozen=True)
class _Lazy:
    """A tensor that is read when it is indexed, as transformers does with what safetensors gives it."""

    read: Callable[[], torch.Tensor]
    shape: tuple[int, ...]

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.read()

    def get_shape(self) -> list[int]:
        """Its shape, as a slice of safetensors tells it."""
        return list(self.shape)


def quantized_base(folder: Path) -> Checkpoint | None:
    """The checkpoint of a folder with a config whose weights are quantized, as that says or in a GGUF file.

    None for any other model. Raises `CheckpointError` for a format that is not known here.
    """
    if gguf_file(folder) is not None:
        return open_base(folder)
    config = read_object(folder / "config.json", CheckpointError)
    told = any(
        isinstance(part.get(key), dict)
        for part in (config, text_config(config))
        for key in ("quantization_config", "compression_config")
    )
    if not told and not (folder / "hf_quant_config.json").is_file():
        return None
    checkpoint = open_base(folder)
    return checkpoint if checkpoint.decoded else None


def decoded_tensors(base: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` takes as a state dict: every tensor by its name in the model, none read yet."""
    return {
        name: _lazy(base, shard, info, dtype) for shard in base.shards for name, info in shard.tensors.items()
    }


def _lazy(base: Checkpoint, shard: TensorFile, info: TensorInfo, dtype: torch.dtype) -> _Lazy:
    weight = base.decoded.get(info.name)

    def read() -> torch.Tensor:
        if weight is None:
            return read_tensor(shard.path, info)
        return weight.read(0, info.elements).to(dtype).view(info.shape)

    return _Lazy(read, tuple(info.shape))


def load_decoded(
    base: Checkpoint, dtype: torch.dtype, device_map: str | dict[str, str | int] | None
) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' report of tensors that were missing or left over."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        # What is loaded is not quantized any more.
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=decoded_tensors(base, dtype),
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
        device_map=device_map,
    )
    return model, report
