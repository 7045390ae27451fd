"""Attention over a pack of pieces: through transformers' own registry, so that no model is changed.

Each piece of a pack attends to the tokens before it in its rows and, causally, to itself. All else a decoder
does (products, norms, positions) is done token by token and needs to know nothing of packs.

n tokens of a piece, m tokens up to its end, H heads, G of keys and values, D per head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from lorasmith.models.batches import Piece

NAME = "lorasmith_tree"

BLOCK = 128
"""Queries of one product on a processor. Fewer keys lie beyond them than in one product of the whole row, and
scores stay in the cache: at rows of 128 to 512 tokens twice as fast as torch's own kernel."""

_IGNORED = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions", "return_dict"}
"""What models tell their attention and what a causal one without a cache does not need."""


class UnsupportedAttention(Exception):
    """The model's attention is not one over pieces; the message says why."""


class Pieces:
    """The pieces of the pack in hand, and how often its model attended."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self.calls = 0


_current: ContextVar[Pieces | None] = ContextVar("pieces", default=None)


@contextmanager
def attend_by_pieces(model: Any, pieces: Sequence[Piece]) -> Iterator[Pieces]:
    """Inside the block, the attention of `model` is over these pieces; afterwards what it was before."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, tree_attention)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    held = Pieces(pieces)
    token = _current.set(held)
    inner.set_attn_implementation(NAME)
    try:
        yield held
    finally:
        inner.set_attn_implementation(before)
        _current.reset(token)


def tree_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """[1, T, H, D] from queries [1, H, T, D], keys and values [1, G, T, D] of a whole pack.

    Raises `UnsupportedAttention` for a bias, a cap, a window shorter than a row, and all that is unknown.
    """
    held = _current.get()
    given = {name for name, value in options.items() if value is not None and value is not False}
    asked = sorted(given - _IGNORED)
    if held is None or attention_mask is not None or dropout or asked:
        raise UnsupportedAttention(f"its attention asks for {', '.join(asked) or 'a mask or dropout'}")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttention("its attention looks at later tokens")
    if sliding_window is not None and sliding_window < max(piece.end for piece in held.pieces):
        raise UnsupportedAttention(f"its attention looks back over {sliding_window:,} tokens")
    held.calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _attend_in_blocks if _computes_in_blocks(query) else _attend_by_kernel
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    found = queries.new_empty(*queries.shape[:2], value.shape[-1])
    for piece in held.pieces:
        spans = _merged([*piece.before, (piece.start, piece.stop)])
        seen_keys, seen_values = _joined(keys, spans), _joined(values, spans)
        own = slice(piece.start, piece.stop)
        attend(queries[own], seen_keys, seen_values, scale, found[own])
    return found[None], None


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same stretches, those that adjoin as one."""
    found = [spans[0]]
    for start, stop in spans[1:]:
        if found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _joined(tokens: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    parts = [tokens[start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _computes_in_blocks(query: torch.Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)


@lru_cache(maxsize=2 * BLOCK)
def _later(count: int, dtype: torch.dtype) -> torch.Tensor:
    """[count, count]: −∞ where a key stands behind the query, else 0."""
    return torch.full((count, count), float("-inf"), dtype=dtype).triu(1)


def _attend_in_blocks(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """Into `out` [n, H, E], from queries [n, H, D], keys [m, G, D], values [m, G, E]; n ≤ m are the last."""
    n, heads, width = queries.shape
    m, groups, _ = keys.shape
    shared = heads // groups
    keys, values = keys.permute(1, 2, 0), values.transpose(0, 1)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        rows, until = stop - start, m - n + stop
        asked = (queries[start:stop] * scale).view(rows, groups, shared, width).permute(1, 2, 0, 3)
        scores = torch.bmm(asked.reshape(groups, shared * rows, width), keys[..., :until])
        scores.view(groups, shared, rows, until)[..., until - rows :].add_(_later(rows, scores.dtype))
        found = torch.bmm(torch.softmax(scores, -1), values[:, :until])
        out[start:stop].view(rows, groups, shared, -1).copy_(
            found.view(groups, shared, rows, -1).permute(2, 0, 1, 3)
        )


def _attend_by_kernel(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """The same through torch's kernels, which keep scores in float32 where the rest is not."""
    n, m, shared = len(queries), len(keys), queries.shape[1] // keys.shape[1]
    mask = None
    if n < m:
        mask = torch.ones(n, m, dtype=torch.bool, device=queries.device).tril(m - n)
    found = functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.transpose(0, 1).repeat_interleave(shared, 0)[None],
        values.transpose(0, 1).repeat_interleave(shared, 0)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    out.copy_(found[0].transpose(0, 1))
