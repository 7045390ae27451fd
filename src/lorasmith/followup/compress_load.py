"""Load a compressed folder through transformers, its weights unpacked to float32: what it computes with."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from lorasmith.errors import CheckpointError, MemoryLimitError
from lorasmith.models.load import LoadedModel, load_tokenizer, quiet_libraries
from lorasmith.models.memory import is_out_of_memory


def load_compressed(folder: Path, *, device: torch.device | None = None) -> LoadedModel:
    """The model in a folder that `compress` wrote, in compressed-tensors or as a GGUF file.

    The stored integers are multiplied out once, so a comparison sees the weights and not the error of a
    kernel. Raises `CheckpointError` where transformers does not load the folder in full.
    """
    device = device or torch.device("cpu")
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        tokenizer = load_tokenizer(folder)
        try:
            # The GGUF reader draws a bar of its own.
            with redirect_stderr(io.StringIO()):
                model, report = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch.float32,
                    attn_implementation="sdpa",
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **_how(folder),
                )
            model = model.to(device).eval()
        except Exception as error:  # transformers and both formats' libraries raise whatever they like
            if is_out_of_memory(error):
                raise MemoryLimitError(
                    "too little memory to load the model in float32", where=folder
                ) from error
            raise CheckpointError(
                f"the compressed model does not load: {type(error).__name__}: {error}", where=folder
            ) from error
    missing = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of the compressed model are missing or left over, such as {missing[0]}",
            where=folder,
        )
    config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=model.get_input_embeddings().weight.shape[0],
        context=getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None),
        device=device,
    )


def _how(folder: Path) -> dict[str, Any]:
    """What tells transformers to unpack the weights."""
    from transformers import CompressedTensorsConfig, GgufConfig

    files = sorted(folder.glob("*.gguf"))
    if files:
        return {"gguf_file": files[0].name, "quantization_config": GgufConfig(dequantize=True)}
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
