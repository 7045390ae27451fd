"""The small files that make a merged folder complete: configs, tokenizer, chat template, shard index."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasmith.checkpoint.jsonfile import dump_object
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import os_errors
from lorasmith.files.model_files import OTHER_FILES, TOKENIZER_FILES, fits
from lorasmith.merging.plan import Plan

_MAIN_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
)
_TEMPLATES = ("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja")


def companions(base: Path, adapters: list[Path]) -> dict[str, Path]:
    """Name in the merged folder → file to copy.

    The tokenizer is that of the first adapter that has a whole one, else the base's; a chat template
    beside an adapter counts even where its tokenizer is the base's. Everything else is the base's.
    """
    chosen = _matching(base, OTHER_FILES)
    with_tokenizer = next((folder for folder in adapters if _has_tokenizer(folder)), base)
    chosen |= _matching(with_tokenizer, TOKENIZER_FILES)
    if with_tokenizer is base:
        for folder in adapters:
            templates = _matching(folder, _TEMPLATES)
            if templates:
                chosen = {name: file for name, file in chosen.items() if name not in _TEMPLATES} | templates
                break
    return dict(sorted(chosen.items()))


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() and any(
        (folder / name).is_file() for name in _MAIN_TOKENIZER_FILES
    )


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    with os_errors(folder, "read"):
        files = [
            file
            for file in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
            if file.is_file()
        ]
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: file for name, file in names.items() if fits(name, patterns)}


def merged_config(
    config: Mapping[str, Any], precision: str, *, untied: bool, vocabulary: int | None
) -> dict[str, Any]:
    """The base's config with the merged model's own type, tying and vocabulary, without a quantization."""
    merged = copy.deepcopy(dict(config))
    merged.pop("quantization_config", None)
    parts = [merged] + [part for part in merged.values() if isinstance(part, dict)]
    if precision != "base":
        for part in parts:
            for field in ("dtype", "torch_dtype"):
                if part.get(field) is not None:
                    part[field] = precision
        if "dtype" not in merged and "torch_dtype" not in merged:
            merged["dtype"] = precision
    if vocabulary is not None:
        holders = [part for part in parts if "vocab_size" in part]
        text = [part for part in holders if part is merged.get("text_config")] or holders[:1] or [merged]
        for part in text:
            part["vocab_size"] = vocabulary
    if untied:
        for part in parts:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
        merged["tie_word_embeddings"] = False
    return merged


def merged_index(base: Checkpoint, plan: Plan) -> bytes | None:
    """The shard index with every tensor's file and the right `total_size`; None for a single file."""
    if base.index is None:
        return None
    weight_map = {output.name: shard for shard, outputs in plan.shards.items() for output in outputs}
    metadata = dict(base.index.get("metadata") or {})
    metadata["total_size"] = sum(output.nbytes for output in plan.outputs)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(output.elements for output in plan.outputs)
    return dump_object({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
