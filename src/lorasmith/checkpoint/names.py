"""How one module is called in a base's files and by the two generations of transformers: maps as data.

An adapter keeps the module paths of the transformers that trained it; a base keeps the names of the
transformers (or the laboratory) that saved it. Each rule below says that two spellings mean one module.
"""

from __future__ import annotations

import re
from collections.abc import Collection

RULES: tuple[tuple[str, str], ...] = (
    # GPT-2's first checkpoints have no `transformer.`; other families hide their prefix the same way.
    (r"^transformer\.", ""),
    (r"^(?=h\.\d+\.|wte|wpe|ln_f)", "transformer."),
    (r"^model\.", ""),
    (r"^(?=layers\.|embed_tokens|norm$)", "model."),
    (r"^gpt_neox\.", ""),
    (r"^(?=embed_in$|final_layer_norm$|layers\.)", "gpt_neox."),
    # Vision-language models: `language_model.model.` (files, transformers 4) and `model.language_model.` (5).
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.language_model\.", "model."),
    (r"^model\.(?=layers\.|embed_tokens|norm$)", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.text_model\.", "model.language_model."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^visual\.", "model.visual."),
    (r"^model\.visual\.", "visual."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    # Mixtral's block is `block_sparse_moe` in files and transformers 4, `mlp` in transformers 5.
    (r"\.block_sparse_moe(?=\.|$)", ".mlp"),
    (r"\.mlp(?=\.gate$|\.experts(?:\.|$))", ".block_sparse_moe"),
)
"""`(pattern, replacement)`: applied to a module path, each gives another spelling of it."""

_MAX_STEPS = 4


def spellings(path: str) -> list[str]:
    """A module path and every other spelling that the rules lead to, the given one first."""
    known = [path]
    frontier = [path]
    for _ in range(_MAX_STEPS):
        following = []
        for spelling in frontier:
            for pattern, replacement in RULES:
                other = re.sub(pattern, replacement, spelling, count=1)
                if other not in known:
                    known.append(other)
                    following.append(other)
        frontier = following
    return known


def resolve(path: str, present: Collection[str]) -> list[str]:
    """The spellings of `path` that are `present`; the path itself alone where it is.

    More than one means that the base itself uses two of the spellings, and the caller cannot know which.
    """
    if path in present:
        return [path]
    return [name for name in spellings(path) if name in present]
