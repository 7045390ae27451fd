"""Logits at the scored positions only, from any causal language model, in chunks: never a full [B, T, V].

A hook before the output embedding takes the hidden states, lets the model finish on a single position, and
the head is then applied to the scored positions a few hundred at a time. Some architectures scale or cap
their logits after the head. `verify` compares this way with the model's own logits and, where they differ,
lets the model itself finish: it runs on a single token, and the hook puts the hidden states in place of that
token's. Which way was taken is `finish`.

B rows, T positions, N scored positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from lorasmith.errors import CheckpointError
from lorasmith.models.batches import Batch, PackPiece

# Attention over a pack of pieces: through transformers' own registry, so that no model is changed.
#
# Each piece of a pack attends to the tokens before it in its rows and, causally, to itself. All else a
# decoder does (products, norms, positions) is done token by token and needs to know nothing of packs.
#
# n tokens of a piece, m tokens up to its end, H heads, G of keys and values, D per head.


NAME = "lorasmith_tree"

BLOCK = 128
"""Queries of one product on a processor. Fewer keys lie beyond them than in one product of the whole row, and
scores stay in the cache: at rows of 128 to 512 tokens twice as fast as torch's own kernel."""

_IGNORED = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions", "return_dict"}
"""What models tell their attention and what a causal one without a cache does not need."""


class UnsupportedAttention(Exception):
    """The model's attention is not one over pieces; the message says why."""


class PackPieces:
    """The pieces of the pack in hand, and how often its model attended."""

    def __init__(self, pieces: Sequence[PackPiece]) -> None:
        self.pieces = pieces
        self.calls = 0


_current: ContextVar[PackPieces | None] = ContextVar("pieces", default=None)


@contextmanager
def attend_by_pieces(model: Any, pieces: Sequence[PackPiece]) -> Iterator[PackPieces]:
    """Inside the block, the attention of `model` is over these pieces; afterwards what it was before."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, tree_attention)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    held = PackPieces(pieces)
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
    attended = queries.new_empty(*queries.shape[:2], value.shape[-1])
    for piece in held.pieces:
        spans = _merged([*piece.before, (piece.start, piece.stop)])
        seen_keys, seen_values = _joined(keys, spans), _joined(values, spans)
        own = slice(piece.start, piece.stop)
        attend(queries[own], seen_keys, seen_values, scale, attended[own])
    return attended[None], None


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same stretches, those that adjoin as one."""
    joined = [spans[0]]
    for start, stop in spans[1:]:
        if joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


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
        attended = torch.bmm(torch.softmax(scores, -1), values[:, :until])
        out[start:stop].view(rows, groups, shared, -1).copy_(
            attended.view(groups, shared, rows, -1).permute(2, 0, 1, 3)
        )


def _attend_by_kernel(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """The same through torch's kernels, which keep scores in float32 where the rest is not."""
    n, m, shared = len(queries), len(keys), queries.shape[1] // keys.shape[1]
    mask = None
    if n < m:
        mask = torch.ones(n, m, dtype=torch.bool, device=queries.device).tril(m - n)
    attended = functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.transpose(0, 1).repeat_interleave(shared, 0)[None],
        values.transpose(0, 1).repeat_interleave(shared, 0)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    out.copy_(attended[0].transpose(0, 1))


CHUNK = 512
"""Scored positions whose logits exist at one time: 100 MB in float32 at V = 49,152."""

_SAME_HEAD = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest error of the chunked head, relative to the largest logit. The same products in another blocking
differ by some 1e-6; a forgotten cap or scale is orders of magnitude above."""
_SAME_HEAD_LOW = 3e-2
"""The same for bfloat16 and float16, whose own step is 8e-3."""
_SAME_PADDED = 1e-2
"""Largest change of a hidden state by padding behind it, relative to the largest: rounding through all layers
stays below 1e-4 in float32; a model that lets tokens see what follows them changes by more than this."""


class TokenForward:
    """The forward of one model; use as a context manager, which takes the hook off again."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.finish = "chunked head"
        """`chunked head` or `own finish`."""
        self._head: Callable[[torch.Tensor], torch.Tensor] = model.get_output_embeddings()
        self._post = _known_transform(model.config.get_text_config())
        self._positions: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        self._given: torch.Tensor | None = None
        self._mode = "off"
        if self._head is None:
            raise CheckpointError(
                f"{type(model).__name__} has no output embedding", expected="a causal language model"
            )
        self._hook = self._head.register_forward_pre_hook(self._intercept)

    def __enter__(self) -> TokenForward:
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()

    def _intercept(self, module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._mode == "off":
            return None
        hidden = args[0]
        if self._mode == "watch":
            self._hidden = hidden.reshape(-1, hidden.shape[-1])
            return None
        if self._mode == "give":
            assert self._given is not None  # set together with the mode
            return (self._given[None].to(hidden.device), *args[1:])
        assert self._positions is not None
        self._hidden = hidden.reshape(-1, hidden.shape[-1])[self._positions.to(hidden.device)]
        return (self._hidden[:1][None], *args[1:])

    def _run(self, batch: Batch | None, mode: str) -> torch.Tensor:
        """The model's own logits: `watch` keeps all hidden states, `take` the scored, `give` sets them."""
        self._mode = mode
        try:
            if batch is None:
                one_token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
                return self.model(input_ids=one_token, use_cache=False).logits
            return run_model(self.model, batch).logits
        finally:
            self._mode, self._positions, self._given = "off", None, None

    def hidden(self, batch: Batch) -> torch.Tensor:
        """[N, H]: what the head gets at the scored positions."""
        self._positions = batch.positions
        self._run(batch, "take")
        hidden, self._hidden = self._hidden, None
        assert hidden is not None  # the head is always called
        return hidden

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V] in float32 from [n, H]."""
        if self.finish == "chunked head":
            return self._post(self._head(hidden)).float()
        self._given = hidden
        return self._run(None, "give")[0].float()

    def logits(self, batch: Batch, *, chunk: int = CHUNK) -> Iterator[torch.Tensor]:
        """[≤ chunk, V] float32 logits of the scored positions, in order."""
        for part in self.hidden(batch).split(chunk):
            yield self.logits_of(part)

    def detach(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What `logits_of` does, without holding the rest of the model where its head alone can do it."""
        if self.finish == "own finish":
            return self.logits_of
        self._hook.remove()
        head, post = self._head, self._post
        return lambda hidden: post(head(hidden)).float()

    def verify(self, batch: Batch, padded: Batch) -> None:
        """Choose the way to finish by the model's own logits on `batch`, a single short row.

        `padded` is the same row with padding behind it. Raises `CheckpointError` when neither way gives the
        model's logits, or when padding behind a token changes what the model makes of it.
        """
        own = self._run(batch, "watch")
        own = own.reshape(-1, own.shape[-1])[batch.positions.to(own.device)].float()
        watched = self._hidden
        assert watched is not None
        self._hidden = None
        tolerance = _SAME_HEAD.get(watched.dtype, _SAME_HEAD_LOW) * float(own.abs().max())
        if not torch.isfinite(own).all():
            return  # reported with the row and the layer when the row is scored
        for finish in ("chunked head", "own finish"):
            self.finish = finish
            mine = torch.cat(list(self.logits(batch)))
            if mine.shape == own.shape and float((mine.to(own.device) - own).abs().max()) <= tolerance:
                break
        else:
            raise CheckpointError(
                f"the logits of {type(self.model).__name__} cannot be computed position by position",
                expected="an output embedding whose logits depend on one position each",
            )
        self._check_padding(batch, padded)

    def _check_padding(self, batch: Batch, padded: Batch) -> None:
        alone, behind = self.hidden(batch).float(), self.hidden(padded).float()
        tolerance = _SAME_PADDED if self.model.dtype == torch.float32 else 10 * _SAME_PADDED
        if float((alone - behind).abs().max()) > tolerance * float(alone.abs().max()):
            raise CheckpointError(
                f"{type(self.model).__name__} is not causal: tokens behind a position change it",
                expected="a causal language model",
            )


def run_model(model: Any, batch: Batch) -> Any:
    """What the model makes of padded rows, or of a pack."""
    if not batch.pieces:
        return model(input_ids=batch.ids, use_cache=False)
    with attend_by_pieces(model, batch.pieces) as attended:
        output = model(input_ids=batch.ids, position_ids=batch.places, use_cache=False)
    layers = model.config.get_text_config().num_hidden_layers
    if attended.calls != layers:
        raise UnsupportedAttention(f"{layers - attended.calls} of its {layers} layers do not attend as usual")
    return output


def _known_transform(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What Gemma 2 (soft cap), Granite (divisor) and Cohere (factor) do to their logits after the head."""
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)

    def transform(logits: torch.Tensor) -> torch.Tensor:
        if divisor is not None:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return transform


def first_non_finite(model: Any, batch: Batch) -> str | None:
    """Name of the first module whose output is not finite on `batch`; None when all of them are."""
    broken: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            if floating and not broken and not torch.isfinite(value).all():
                broken.append(name or type(module).__name__)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        run_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return broken[0] if broken else None
