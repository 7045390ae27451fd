"""How large a run is: the model by its headers, the test set in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.model import HEAD_NAMES, Checkpoint, text_config
from lorasmith.records.dataset import Example

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_CHARACTERS_PER_TOKEN = 3.5
"""Where there is no tokenizer.json to count with: English text and code lie between 3 and 4.5."""
_TEMPLATE_TOKENS = 20
"""What a chat template adds to a row: role markers and a short system message (SmolLM2: 22, Qwen2.5: 24)."""

_FLOOR_ROWS = 16
"""So many rows does the adapter run again: for the noise floor, and in the serving type."""


@dataclass(frozen=True)
class ModelSize:
    """What the time and the memory of a forward depend on."""

    parameters: int
    """As stored: a tied head counts once."""
    active: int
    """Of the layers, as far as one token meets them: of experts only those it is sent to."""
    hidden: int
    layers: int
    vocabulary: int
    context: int | None
    base_bytes: int
    merged_bytes: int
    adapter_parameters: int


@dataclass(frozen=True)
class WorkSize:
    """What there is to score."""

    rows: int
    tokens: int
    """Prompts, templates and responses."""
    scored: int
    longest: int
    squares: int
    """Σ length², which attention grows with."""
    floor_tokens: int
    """Tokens of the rows that the adapter runs again: for the noise floor, and in the serving type."""
    counted: bool
    """False where the tokens are guessed from the characters."""


def model_size(base: Checkpoint, adapter: Adapter | None, merged_bytes: int) -> ModelSize:
    """From headers and config alone."""
    config = text_config(base.config)
    counts = {name: info.elements for name, info in base.tensors.items()}
    outer = sum(count for name, count in counts.items() if name.endswith(EMBEDDINGS) or name in HEAD_NAMES)
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    body = sum(counts.values()) - outer
    return ModelSize(
        parameters=sum(counts.values()),
        active=int(body - experts * (1 - _routed(config))),
        hidden=_whole(config, "hidden_size", "n_embd", "d_model") or 0,
        layers=_whole(config, "num_hidden_layers", "n_layer") or 0,
        vocabulary=_whole(config, "vocab_size") or 0,
        context=_whole(config, "max_position_embeddings", "n_positions"),
        base_bytes=base.total_bytes,
        merged_bytes=merged_bytes,
        adapter_parameters=sum(info.elements for info in adapter.tensors.values()) if adapter else 0,
    )


def _routed(config: Mapping[str, Any]) -> float:
    """The fraction of the experts that a token is sent to."""
    there = _whole(config, "num_local_experts", "num_experts", "n_routed_experts")
    used = _whole(config, "num_experts_per_tok", "num_experts_per_token")
    return min(1.0, used / there) if there and used else 1.0


def _whole(config: Mapping[str, Any], *names: str) -> int | None:
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def work_size(examples: list[Example], base: Path) -> WorkSize:
    """Counted with the base's tokenizer where it has a tokenizer.json, else guessed from the characters."""
    pairs, counted = row_lengths(examples, base)
    totals = sorted(prompt + response for prompt, response in pairs)
    step = max(1, len(totals) // _FLOOR_ROWS)
    return WorkSize(
        rows=len(totals),
        tokens=sum(totals),
        scored=sum(response + 1 for _, response in pairs),
        longest=totals[-1] if totals else 0,
        squares=sum(length * length for length in totals),
        floor_tokens=sum(totals[::step][:_FLOOR_ROWS]),
        counted=counted,
    )


def row_lengths(examples: list[Example], base: Path) -> tuple[list[tuple[int, int]], bool]:
    """Tokens of each prompt, with its template, and of each response; False where they are guessed."""
    lengths = _lengths(examples, base / "tokenizer.json")
    pairs = lengths or [
        (int(len(row.prompt) / _CHARACTERS_PER_TOKEN), int(len(row.response) / _CHARACTERS_PER_TOKEN) + 1)
        for row in examples
    ]
    return [(prompt + _TEMPLATE_TOKENS, response) for prompt, response in pairs], lengths is not None


def _lengths(examples: list[Example], file: Path) -> list[tuple[int, int]] | None:
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises bare Exception; scoring says what is wrong with the file
        return None
    prompts = tokenizer.encode_batch([row.prompt for row in examples], add_special_tokens=False)
    responses = tokenizer.encode_batch([row.response for row in examples], add_special_tokens=False)
    return [(len(prompt.ids), len(one.ids)) for prompt, one in zip(prompts, responses, strict=True)]
