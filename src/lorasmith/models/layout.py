"""How rows go through a model together: packed where its attention allows that, else padded.

Whether it does is looked up in the config (a window shorter than the longest row) and then tried: some short
rows, packed, have to give the hidden states that each of them gives alone through the model's own attention.
So a state-space layer, positions in the attention scores, or a mask of the model's own are noticed, known or
not. The answer stands in `ScoringSettings.layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch

from lorasmith.models.batches import Batch, make_batch, make_pack, plan_batches, plan_packs
from lorasmith.models.device import Route, is_out_of_memory, use_route
from lorasmith.models.forward import TokenForward, UnsupportedAttention
from lorasmith.models.load import LoadedModel, first_line, quiet_libraries
from lorasmith.models.text import Encoded
from lorasmith.records.base import Finding

PACKED, PADDED = LAYOUTS = ("packed", "padded")

_SAME = 1e-3
"""Largest difference of a hidden state, relative to the largest. Rounding through all layers stays below 1e-4
in float32; what leaks from one row into another is of the order of the states themselves."""
_SAME_LOW = 0.1
"""The same in bfloat16 and float16, whose own step is 8e-3."""

_WINDOWS = ("sliding_window", "attention_chunk_size")
"""What configs call the number of tokens that a layer looks back over."""


def choose_layout(loaded: LoadedModel, rows: Sequence[Encoded], route: Route) -> tuple[str, str]:
    """`packed` and nothing, or `padded` and why; raises what the model raises where memory ran out."""
    reason = _limited(loaded.model.config.get_text_config(), max(len(row.ids) for row in rows))
    if not reason:
        with quiet_libraries(), use_route(route), TokenForward(loaded.model, loaded.device) as forward:
            reason = _try(forward, _examples(rows))
    return (PADDED, reason) if reason else (PACKED, "")


def layout_findings(reason: str) -> list[Finding]:
    """Says why rows are padded, where they are."""
    if not reason:
        return []
    message = f"rows are padded, and what several of them begin with is computed for each: {reason}"
    return [Finding(severity="note", code="padded", message=message)]


def plan_rows(
    rows: Sequence[Encoded], layout: str, batch_tokens: int, batch_size: int | None = None
) -> list[tuple[int, ...]]:
    """Row indices of each batch of a layout; `plan_packs` and `plan_batches` say which."""
    if layout == PACKED:
        return plan_packs(rows, batch_tokens, batch_size)
    return plan_batches([len(row.ids) for row in rows], batch_tokens, batch_size)


def lay_out(rows: Sequence[int], encoded: Sequence[Encoded], layout: str) -> Batch:
    """The tensors of a batch."""
    return make_pack(rows, encoded) if layout == PACKED else make_batch(rows, encoded)


def _limited(config: Any, longest: int) -> str:
    """Why the config rules packs out for rows of up to `longest` tokens; nothing where it does not."""
    windows = [getattr(config, name, None) for name in _WINDOWS]
    shortest = min((window for window in windows if isinstance(window, int)), default=None)
    if shortest is not None and shortest < longest:
        return f"its attention looks back over {shortest:,} tokens, and the longest row has {longest:,}"
    other = {str(kind) for kind in getattr(config, "layer_types", None) or ()} - {"full_attention"}
    if other and shortest is None:
        return f"it has layers of {', '.join(sorted(other))}"
    return ""


def _examples(rows: Sequence[Encoded]) -> list[Encoded]:
    """Two short rows that begin alike, and one of the same tokens backwards."""
    shortest = min(rows, key=lambda row: (len(row.ids), row.ids))
    tokens = list(islice(cycle(dict.fromkeys(shortest.ids)), 29))
    made = [tokens[:17], tokens[:10] + tokens[18:29], tokens[13::-1]]
    return [Encoded.behind(ids, 1) for ids in made]


def _try(forward: TokenForward, rows: Sequence[Encoded]) -> str:
    """Why packs do not do for this model; nothing where they do."""
    try:
        alone = [forward.hidden(make_batch([row], rows).to(forward.device)) for row in range(len(rows))]
        packed = forward.hidden(make_pack(range(len(rows)), rows).to(forward.device)).float()
    except UnsupportedAttention as error:
        return str(error)
    except Exception as error:  # an architecture may fail on packed tokens in any way
        if is_out_of_memory(error):
            raise
        return f"it does not take packed tokens: {first_line(error)}"
    expected = torch.cat(alone).float()
    if not torch.isfinite(expected).all():
        return ""  # reported with the row and the layer when the row is scored
    tolerance = _SAME if alone[0].dtype in (torch.float32, torch.float64) else _SAME_LOW
    if not float((packed - expected).abs().max()) <= tolerance * float(expected.abs().max()):
        return "packed rows do not give what each of them gives alone"
    return ""
