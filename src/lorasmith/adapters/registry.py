"""The variants, as a list to read: each says which tensors of a module it accounts for.

To add one: a file beside this with the maths, a line here, and a case in tests/adapters/cases.py.
"""

from __future__ import annotations

from lorasmith.adapters.base import Variant
from lorasmith.adapters.bias import LoraBias, TrainedBias
from lorasmith.adapters.dora import Dora
from lorasmith.adapters.embedding import EmbeddingLora
from lorasmith.adapters.experts import Experts
from lorasmith.adapters.lora import Lora
from lorasmith.adapters.replacements import SavedModule, TrainableTokens

VARIANTS: tuple[Variant, ...] = (
    Lora(),
    Dora(),
    EmbeddingLora(),
    Experts(),
    LoraBias(),
    TrainedBias(),
    SavedModule(),
    TrainableTokens(),
)

SUFFIXES: tuple[str, ...] = (
    "base_layer.lora_A.weight",
    "base_layer.lora_B.weight",
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector.weight",
    "lora_magnitude_vector",
    "token_adapter.trainable_tokens_delta",
    "modules_to_save.weight",
    "modules_to_save.bias",
    "original_module.weight",
    "original_module.bias",
    "base_layer.weight",
    "base_layer.bias",
    "weight",
    "bias",
)
"""What may stand behind a module's path in an adapter's file, the longer ones first."""


def split_name(name: str) -> tuple[str, str] | None:
    """Module path and suffix of a name on disk without PEFT's prefix; None where no suffix is known."""
    for suffix in SUFFIXES:
        if name.endswith("." + suffix):
            path = name[: -len(suffix) - 1]
            # `…lora_C.weight` is no weight of a module called lora_C.
            return None if ".lora_" in path else (path, suffix)
    return None
