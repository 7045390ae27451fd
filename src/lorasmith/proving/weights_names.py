"""From module paths, as adapters have them, to names of tensors on disk.

Three kinds of names meet here: those in the base's files, and the module paths of transformers 4 and 5,
which renamed some modules in memory only. The tables are data; a path that fits the base as it is needs none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

STARTS: tuple[tuple[str, ...], ...] = (
    ("model.language_model.", "language_model.model.", "language_model.", "model."),
    ("model.text_model.", "text_model.model.", "text_model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.audio_tower.", "audio_tower."),
    ("lm_head.", "language_model.lm_head."),
    ("lm_head.", "embed_out."),
    ("transformer.", ""),
    ("model.", ""),
    ("gpt_neox.", ""),
)
"""Beginnings that mean the same, in transformers 4, in transformers 5, or in a file of the bare model."""

MIDDLES: tuple[tuple[str, str], ...] = ((".block_sparse_moe.", ".mlp."),)
"""Inner parts that mean the same."""

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
"""Last part of the path of an input embedding."""

HEADS = ("lm_head", "embed_out")
"""Last part of the path of an output head."""

EXPERT_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Parameter that stacks all experts → what its rows are, from the top, where each expert has its own file
tensors: first as Qwen and most others call them, then as Mixtral does."""

TRANSPOSED_EXPERTS = frozenset(("gpt_oss", "openai_privacy_filter", "aria", "aria_text"))
"""Model types whose classes say that their stacked experts are [E, in, out] (`is_transposed`)."""


def spellings(path: str) -> Iterator[str]:
    """A path ending in a dot, and all others that may mean the same module; itself first."""
    seen: dict[str, None] = {path: None}
    for middle in ("", *MIDDLES):
        inner = path
        if middle:
            for have, want in (middle, middle[::-1]):
                if have in path:
                    inner = path.replace(have, want)
        seen.setdefault(inner)
        for group in STARTS:
            for have in group:
                if inner.startswith(have) and (have or not inner.startswith(group[0])):
                    for want in group:
                        seen.setdefault(want + inner[len(have) :])
    return iter(seen)


def find(path: str, leaf: str, names: Iterable[str]) -> list[str]:
    """Names on disk that may be the tensor `leaf` of the module at `path`: one, or none, or too many.

    A name that fits as it is wins over all other spellings.
    """
    known = names if isinstance(names, dict | set | frozenset) else set(names)
    found = [f"{spelling}{leaf}" for spelling in spellings(f"{path}.") if f"{spelling}{leaf}" in known]
    return found[:1] if found and found[0] == f"{path}.{leaf}" else found


def expert_names(path: str, part: str, names: Iterable[str]) -> dict[int, str]:
    """Number of an expert → name of its weight, for a module of experts that are stored one by one."""
    starts = tuple(spellings(f"{path}."))
    result: dict[int, str] = {}
    ending = f".{part}.weight"
    for name in names:
        if name.endswith(ending) and name.startswith(starts):
            match = re.fullmatch(r"(.*\.)(\d+)", name.removesuffix(ending))
            if match and match[1] in starts:
                result[int(match[2])] = name
    return result


def is_named(path: str, listed: object) -> bool:
    """Whether a config's list of targets names a path or its end; such a weight is taken as it is stored."""
    named = listed if isinstance(listed, list) else []
    return any(isinstance(one, str) and f".{path}".endswith(f".{one}") for one in named)


def is_embedding(path: str) -> bool:
    """Whether a module path is an input embedding's."""
    return path.rpartition(".")[2] in EMBEDDINGS


def is_head(path: str) -> bool:
    """Whether a module path is an output head's."""
    return path.rpartition(".")[2] in HEADS
