"""Which rows go through the model together: sorted by length, as many as a budget of tokens holds.

Rows are padded on the right and no mask is given. In a causal model a token sees only itself and what stands
before it, and padding stands behind every real token: it cannot reach a real position, whatever it holds. So
the mask would change nothing but the speed. `forward.TokenForward.verify` checks this on the model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasmith.models.encode import Encoded

BATCH_TOKENS = 1024
"""Default budget on a processor: padded tokens of a batch. Its activations then stay in the cache:
SmolLM2-135M scored 330 tokens per core second with it, 240 with 4,096, and 325 with 256."""

BATCH_TOKENS_GPU = 16_384
"""The same on a GPU, which wants larger products and has no such cache."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a pack that stand one after the other in one or more of its rows."""

    start: int
    """Index in the pack of the first of them."""
    stop: int
    """Index behind the last."""
    before: tuple[tuple[int, int], ...]
    """Where in the pack the tokens before them in their rows lie: start and stop of each stretch."""

    @property
    def end(self) -> int:
        """How many tokens those rows have up to the piece's last."""
        return self.stop - self.start + sum(stop - start for start, stop in self.before)


@dataclass(frozen=True)
class Batch:
    """Some rows of a test set as tensors. B rows, T positions, N scored tokens.

    Either padded rows, or a pack of B = 1 with `places` and `pieces`.
    """

    rows: tuple[int, ...]
    """Their indices in the test set."""
    ids: torch.Tensor
    """[B, T] int64, padded on the right."""
    lengths: torch.Tensor
    """[B] int64."""
    positions: torch.Tensor
    """[N] int64: index into the B·T positions of the one that predicts each scored token, row after row."""
    targets: torch.Tensor
    """[N] int64: the scored tokens."""
    counts: tuple[int, ...]
    """Scored tokens of each row."""
    places: torch.Tensor | None = None
    """[1, T] int64: where in its rows each token of a pack stands."""
    pieces: tuple[Piece, ...] = ()
    """Of a pack."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            self.rows,
            self.ids.to(device),
            self.lengths.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.counts,
            None if self.places is None else self.places.to(device),
            self.pieces,
        )


def plan_batches(
    lengths: Sequence[int], batch_tokens: int = BATCH_TOKENS, batch_size: int | None = None
) -> list[tuple[int, ...]]:
    """Row indices of each batch: longest first, rows × longest length ≤ `batch_tokens`, ≤ `batch_size` rows.

    A row longer than the budget gets a batch of its own. Longest first, so that a lack of memory shows at
    once. Depends only on the lengths and their order in the file.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[tuple[int, ...]] = []
    current: list[int] = []
    for row in order:
        full = bool(current) and (len(current) + 1) * lengths[current[0]] > batch_tokens
        if full or len(current) == batch_size:
            batches.append(tuple(current))
            current = []
        current.append(row)
    if current:
        batches.append(tuple(current))
    return batches


def make_batch(rows: Sequence[int], encoded: Sequence[Encoded], *, pad_to: int = 0) -> Batch:
    """The tensors of a batch; `pad_to` asks for more padding than the longest row needs."""
    width = max(pad_to, *(len(encoded[row].ids) for row in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions, targets, counts = [], [], []
    for place, row in enumerate(rows):
        tokens = encoded[row].ids
        start = encoded[row].scored_from
        ids[place, : len(tokens)] = torch.tensor(tokens)
        positions.append(torch.arange(start - 1, len(tokens) - 1) + place * width)
        targets.append(torch.tensor(tokens[start:]))
        counts.append(len(tokens) - start)
    return Batch(
        rows=tuple(rows),
        ids=ids,
        lengths=torch.tensor([len(encoded[row].ids) for row in rows]),
        positions=torch.cat(positions),
        targets=torch.cat(targets),
        counts=tuple(counts),
    )


def halve(rows: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Two halves of a batch that did not fit in memory; empty when it was a single row already."""
    if len(rows) < 2:
        return []
    middle = len(rows) // 2
    return [rows[:middle], rows[middle:]]
