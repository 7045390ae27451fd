"""Both models, and the adapter twice, over the rows of a test set: numbers per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from lorasmith.executors.local import work_through
from lorasmith.files.journal import Journal
from lorasmith.models.arithmetic import Route, other_route, use_route
from lorasmith.models.batches import Batch, make_batch, plan_batches
from lorasmith.models.divergence import TokenPairs, compare_logits
from lorasmith.models.forward import TokenForward
from lorasmith.models.load import LoadedModel
from lorasmith.models.loglik import open_forward, raise_non_finite
from lorasmith.models.session import Workload
from lorasmith.models.work import RowWork
from lorasmith.progress import Progress

FLOOR_ROWS = 8
"""Rows on which the floor is measured, spread over all lengths: some hundred tokens give its mean to a fifth,
and a grade asks for a factor of two, where a rounded merge is six orders of magnitude away."""

_ELEMENTS = 1 << 24
"""Logits of one model that exist at one time: 64 MB in float32; a comparison makes some eight such."""


@dataclass(frozen=True)
class Measured:
    """Pairs of every row, and of the adapter with itself on the rows of the floor."""

    rows: list[TokenPairs]
    floor: list[TokenPairs]
    layouts: list[str]


def measure(
    work: Workload,
    a: LoadedModel,
    b: LoadedModel,
    route: Route,
    journal: Journal | None,
    progress: Progress,
) -> Measured:
    """Run both models over all rows, and the adapter twice over the rows of the floor."""
    chunk = max(1, _ELEMENTS // a.vocabulary)
    other = other_route(route, a.device)
    with open_forward(a, work.rows, route) as adapted, open_forward(b, work.rows, route) as merged:
        rows = _all_pairs(work, adapted, merged, chunk, journal, progress)
        floor = _floor_pairs(work, adapted, chunk, other, progress)
    layouts = [
        f"batches of {work.settings.batch_tokens} tokens, {route.label}",
        f"one row at a time, {other.label}",
    ]
    return Measured(rows, floor, layouts)


def _all_pairs(
    work: Workload,
    a: TokenForward,
    b: TokenForward,
    chunk: int,
    journal: Journal | None,
    progress: Progress,
) -> list[TokenPairs]:
    """The pairs of every row, in the order of the test set."""
    found: dict[int, TokenPairs] = {}
    with progress("Compare", total=work.tokens, unit="tok") as advance:
        comparing = _pair_work(
            work, lambda rows: _compare_batch(work, a, b, chunk, make_batch(rows, work.rows).to(a.device))
        )
        for rows, pairs in work_through(work.batches(), comparing, journal):
            found.update(zip(rows, pairs, strict=True))
            advance(sum(len(work.rows[row].ids) for row in rows))
    return [found[row] for row in range(len(work.rows))]


def _pair_work(
    work: Workload, action: Callable[[tuple[int, ...]], list[TokenPairs]]
) -> RowWork[list[TokenPairs]]:
    return RowWork(
        work.rows,
        action=action,
        to_arrays=lambda rows: [array for row in rows for array in row.arrays()],
        from_arrays=lambda rows, arrays: [
            TokenPairs(*arrays[start : start + len(arrays) // len(rows)])
            for start in range(0, len(arrays), len(arrays) // len(rows))
        ],
    )


def _compare_batch(
    work: Workload, a: TokenForward, b: TokenForward, chunk: int, batch: Batch
) -> list[TokenPairs]:
    """Both models on one batch; the pairs of each of its rows."""
    pairs = _pairs(a.logits(batch, chunk=chunk), b.logits(batch, chunk=chunk), batch)
    rows = _split(pairs, batch)
    for row, one in zip(batch.rows, rows, strict=True):
        for values, forward in ((one.logprob_a, a), (one.logprob_b, b)):
            if not np.isfinite(values).all():
                raise_non_finite(forward, batch, work.names[row])
    return rows


def _pairs(logits_a: Iterator[torch.Tensor], logits_b: Iterator[torch.Tensor], batch: Batch) -> TokenPairs:
    parts, start = [], 0
    for one, two in zip(logits_a, logits_b, strict=True):
        parts.append(compare_logits(one, two, batch.targets[start : start + len(one)]))
        start += len(one)
    return TokenPairs.join(parts)


def _split(pairs: TokenPairs, batch: Batch) -> list[TokenPairs]:
    found, start = [], 0
    for count in batch.counts:
        found.append(pairs.part(slice(start, start + count)))
        start += count
    return found


def _floor_pairs(
    work: Workload, forward: TokenForward, chunk: int, other: Route, progress: Progress
) -> list[TokenPairs]:
    """The adapter against itself on a sample of rows: in batches, and one row at a time by another route."""
    order = [row for batch in work.batches() for row in batch]
    sample = order[:: -(-len(order) // FLOOR_ROWS)]
    batches = plan_batches([len(work.rows[row].ids) for row in sample], work.settings.batch_tokens)
    found: list[TokenPairs] = []
    total = sum(len(work.rows[row].ids) for row in sample)
    with progress("Noise floor", total=total, unit="tok") as advance:
        measuring = _pair_work(work, lambda rows: _floor_batch(work, forward, chunk, other, rows))
        for rows, pairs in work_through(
            [tuple(sample[place] for place in batch) for batch in batches], measuring
        ):
            found.extend(pairs)
            advance(sum(len(work.rows[row].ids) for row in rows))
    return found


def _floor_batch(
    work: Workload, forward: TokenForward, chunk: int, other: Route, rows: tuple[int, ...]
) -> list[TokenPairs]:
    batch = make_batch(rows, work.rows).to(forward.device)
    pieces = [min(chunk, count - start) for count in batch.counts for start in range(0, count, chunk)]
    together = forward.logits(batch, sizes=pieces)
    found = []
    for row in rows:
        alone = make_batch([row], work.rows).to(forward.device)

        def elsewhere(alone: Batch = alone) -> Iterator[torch.Tensor]:
            pending = forward.logits(alone, chunk=chunk)
            for _ in range(-(-alone.counts[0] // chunk)):
                with use_route(other):
                    logits = next(pending)
                yield logits

        found.append(_pairs(islice(together, -(-alone.counts[0] // chunk)), elsewhere(), alone))
    return found
