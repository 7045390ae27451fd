"""Which rows go through the model together: sorted by length, as many as a budget of tokens holds.

Rows are padded on the right and no mask is given. In a causal model a token sees only itself and what stands
before it, and padding stands behind every real token: it cannot reach a real position, whatever it holds. So
the mask would change nothing but the speed. `forward.TokenForward.verify` checks this on the model at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from lorasmith.models.text import Encoded

BATCH_TOKENS = 1024
"""Default budget on a processor: padded tokens of a batch. Its activations then stay in the cache:
SmolLM2-135M scored 330 tokens per core second with it, 240 with 4,096, and 325 with 256."""

BATCH_TOKENS_GPU = 16_384
"""Default budget on a GPU, which wants larger products and has no such cache."""


@dataclass(frozen=True)
class PackPiece:
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
    pieces: tuple[PackPiece, ...] = ()
    """Pieces of a pack, each before those that continue it."""

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
        scored = torch.tensor(encoded[row].scored_at)
        ids[place, : len(tokens)] = torch.tensor(tokens)
        positions.append(scored - 1 + place * width)
        targets.append(torch.tensor(encoded[row].targets))
        counts.append(len(scored))
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


# Rows behind one another without padding, and what several of them begin with only once.
#
# Rows of a test set share much: the head of the chat template, a benchmark's instructions, the passage that
# several questions are about. In a causal model a token's hidden state depends on nothing but itself and the
# tokens before it, so rows that begin alike have the same states there. A pack holds each such beginning
# once: a tree whose nodes are pieces of rows. `tree_attention` lets every piece see its own tokens and those
# before it in its rows.


SHARED = 8
"""Tokens that rows must have in common beyond what they share anyway before they get a piece of their own:
each piece costs some products of its own in every layer, about as much as a few tokens."""


def plan_packs(rows: Sequence[Encoded], budget: int, batch_size: int | None = None) -> list[tuple[int, ...]]:
    """Row indices of each pack: neighbours in the order of their tokens, so that they share most.

    A pack holds at most `budget` tokens (what rows share counted once) and `batch_size` rows; a row longer
    than the budget gets a pack of its own. The packs with the longest rows come first, so that a lack of
    memory shows at once. Depends only on the rows' tokens and their order in the file.
    """
    order = sorted(range(len(rows)), key=lambda row: (rows[row].ids, row))
    packs: list[list[int]] = []
    held = 0
    for row, before in zip(order, [None, *order], strict=False):
        length = len(rows[row].ids)
        shared = 0 if before is None else common_length(rows[before].ids, rows[row].ids)
        added = length - (shared if shared >= SHARED else 0)
        if not packs or held + added > budget or len(packs[-1]) == batch_size:
            packs.append([])
            held, added = 0, length
        packs[-1].append(row)
        held += added
    packs.sort(key=lambda pack: (-max(len(rows[row].ids) for row in pack), min(pack)))
    return [tuple(pack) for pack in packs]


def common_length(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for place, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return place
    return min(len(one), len(two))


def make_pack(rows: Sequence[int], encoded: Sequence[Encoded]) -> Batch:
    """The tensors of a pack: one sequence [1, T] of pieces."""
    tree = _Tree([encoded[row].ids for row in rows])
    positions, targets, counts = [], [], []
    for row, path in zip(rows, tree.paths, strict=True):
        scored = torch.tensor(encoded[row].scored_at)
        positions.append(torch.cat([torch.arange(*span) for span in path])[scored - 1])
        targets.append(torch.tensor(encoded[row].targets))
        counts.append(len(scored))
    return Batch(
        rows=tuple(rows),
        ids=torch.tensor([tree.ids]),
        lengths=torch.tensor([len(encoded[row].ids) for row in rows]),
        positions=torch.cat(positions),
        targets=torch.cat(targets),
        counts=tuple(counts),
        places=torch.tensor([tree.places]),
        pieces=tuple(tree.pieces),
    )


Span = tuple[int, int]


class _Tree:
    """Grows the pieces of some rows, each before those that continue it."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.ids: list[int] = []
        self.places: list[int] = []
        self.pieces: list[PackPiece] = []
        self.paths: list[tuple[Span, ...]] = [() for _ in rows]
        """Where in the pack the tokens of each row lie."""
        self._rows = rows
        self._grow(sorted(range(len(rows)), key=lambda row: rows[row]), 0, ())

    def _grow(self, group: list[int], depth: int, before: tuple[Span, ...]) -> None:
        """The part of the tree for rows, in the order of their tokens, that share their first `depth`."""
        common = common_length(self._rows[group[0]], self._rows[group[-1]])
        if len(group) == 1 or common - depth >= SHARED:
            before = self._add(self._rows[group[0]][depth:common], depth, before)
            depth = common
        parts: list[list[int]] = []
        for row in group:
            if len(self._rows[row]) == depth:
                self.paths[row] = before
            elif parts and common_length(self._rows[parts[-1][-1]], self._rows[row]) >= depth + SHARED:
                parts[-1].append(row)
            else:
                parts.append([row])
        for part in parts:
            self._grow(part, depth, before)

    def _add(self, tokens: list[int], depth: int, before: tuple[Span, ...]) -> tuple[Span, ...]:
        if not tokens:
            return before
        start, stop = len(self.ids), len(self.ids) + len(tokens)
        self.ids += tokens
        self.places += range(depth, depth + len(tokens))
        self.pieces.append(PackPiece(start, stop, before))
        if before and before[-1][1] == start:  # right behind what it continues
            return (*before[:-1], (before[-1][0], stop))
        return (*before, (start, stop))


# A training batch in parts that fit in memory; their gradients add up.


class Tokens(Protocol):
    """Anything that is a row of tokens."""

    @property
    def ids(self) -> list[int]:
        """Prompt and response."""


R = TypeVar("R", bound=Tokens)


def split_batch(rows: Sequence[R], most_tokens: int) -> Iterator[list[R]]:
    """A training batch in parts of at most `most_tokens` padded tokens, or of one row, shortest rows first.

    The gradients of the parts add up to the batch's; only one part's activations are in memory.
    """
    part: list[R] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if part and len(row.ids) * (len(part) + 1) > most_tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part
