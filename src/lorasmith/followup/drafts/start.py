"""The draft before its training: a small base or layers of the target, of one vocabulary with the target."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasmith.checkpoint.header import read_object
from lorasmith.checkpoint.model import text_config
from lorasmith.errors import CheckpointError, UsageError
from lorasmith.models.load import load_model

_LAYER = re.compile(r"(?P<before>(?:^|\.)(?:layers|h|blocks)\.)(?P<number>\d+)(?=\.)")
_PROBES = ("The answer is 42.", "def add(a, b):\n    return a + b\n", "Überraschung — ∑ 你好 🙂")
"""Texts whose tokens are compared: two tokenizers of one vocabulary can still cut text differently."""


@dataclass(frozen=True)
class Draft:
    """A draft model in float32, with the target's tokenizer."""

    model: Any
    tokenizer: Any
    padded_rows: int
    target_parameters: int
    layers: list[int] | None
    context: int | None


def require_layers(target: Path, layers: Sequence[int]) -> None:
    """Raise `UsageError` for layers that the target's config says do not exist; nothing is loaded."""
    text = text_config(read_object(target / "config.json", CheckpointError))
    total = int(text.get("num_hidden_layers", text.get("n_layer", 0)))
    absent = [layer for layer in layers if not 0 <= layer < total]
    if absent or not layers:
        raise UsageError(
            f"the target has no layer {absent[0]}" if absent else "no layer is kept",
            where=target,
            expected=f"layers 0 to {total - 1}",
            remedy="the last layers matter most to the output: keep the first and the last ones",
        )


def cut_from_target(target: Path, layers: Sequence[int], device: torch.device) -> Draft:
    """A draft of the target's embeddings, head, norms and chosen layers, which `require_layers` looked at."""
    loaded = load_model(target, device=torch.device("cpu"))
    config = copy.deepcopy(loaded.model.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in layers]
    model = type(loaded.model)(config)
    source = loaded.model.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(source[_LAYER.sub(lambda m: f"{m['before']}{layers[int(m['number'])]}", name)])
    model.generation_config = loaded.model.generation_config
    return Draft(model.to(device), loaded.tokenizer, 0, loaded.parameters, list(layers), loaded.context)


def from_base(base: Path, target: Path, device: torch.device) -> Draft:
    """A small base, its embedding padded to the target's rows; `require_same_tokenizer` comes before it."""
    draft, aim = load_model(base, device=torch.device("cpu")), load_model(target, device=torch.device("cpu"))
    added = match_vocabulary(draft.model, aim.vocabulary, len(aim.tokenizer))
    context = min((size for size in (draft.context, aim.context) if size), default=None)
    return Draft(draft.model.to(device), aim.tokenizer, added, aim.parameters, None, context)


def require_same_tokenizer(draft: Any, target: Any, base: Path, place: Path) -> None:
    """Raise `CheckpointError` unless both tokenizers give the same ids to the same text.

    Else a drafted token would mean another one to the target.
    """
    ours, theirs = draft.get_vocab(), target.get_vocab()
    different = [token for token in theirs if ours.get(token) != theirs[token]]
    for text in _PROBES:
        if draft(text)["input_ids"] != target(text)["input_ids"]:
            different.append(text)
    if different:
        raise CheckpointError(
            f"the draft's tokenizer is not the target's: {different[0]!r} has other ids "
            f"({len(different)} differences)",
            where=base,
            expected=f"the tokenizer of {place}",
            remedy="take a small model of the target's own family, or --from-target --layers …",
        )


def match_vocabulary(model: Any, rows: int, used: int) -> int:
    """Give the embedding (and head) `rows` rows; returns how many were added, below 0 for taken away.

    `used` tokens stand in text. New rows are copies of an unused one where there is one, which training has
    pushed down, else the mean of all: a row of zeros could be the likeliest of all tokens.
    """
    embedding = model.get_input_embeddings().weight
    before = embedding.shape[0]
    if before == rows:
        return 0
    if rows < used:
        raise CheckpointError(
            f"the target has {rows:,} embedding rows, its tokenizer {used:,} tokens",
            remedy="copy the tokenizer files that belong to the target into its folder",
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
    if rows > before:
        head = model.get_output_embeddings()
        with torch.no_grad():
            for weight in {id(w): w for w in (model.get_input_embeddings().weight, head.weight)}.values():
                weight[before:] = weight[before - 1] if before > used else weight[:before].mean(0)
    return rows - before
