"""Rows behind one another without padding, and what several of them begin with only once.

Rows of a test set share much: the head of the chat template, a benchmark's instructions, the passage that
several questions are about. In a causal model a token's hidden state depends on nothing but itself and the
tokens before it, so rows that begin alike have the same states there. A pack holds each such beginning once:
a tree whose nodes are pieces of rows. `tree_attention` lets every piece see its own tokens and those before
it in its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorasmith.models.batches import Batch, Piece
from lorasmith.models.encode import Encoded

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
        tokens, start = encoded[row].ids, encoded[row].scored_from
        positions.append(torch.cat([torch.arange(*span) for span in path])[start - 1 : len(tokens) - 1])
        targets.append(torch.tensor(tokens[start:]))
        counts.append(len(tokens) - start)
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
        self.pieces: list[Piece] = []
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
        self.pieces.append(Piece(start, stop, before))
        if before and before[-1][1] == start:  # right behind what it continues
            return (*before[:-1], (before[-1][0], stop))
        return (*before, (start, stop))
