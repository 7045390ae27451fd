"""Adapter, adapter again, merged model: run one after the other, then compared token by token.

Of each model the hidden states at the scored positions stay, on disk, and its head in memory. So the two need
not fit into memory together, and what validation has kept is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lorasmith.executors.base import Executor, Local, Recipe
from lorasmith.executors.local import work_through
from lorasmith.executors.log import ChunkLog
from lorasmith.files.allocator import keep_memory
from lorasmith.files.journal import Journal, Rows
from lorasmith.models.arithmetic import Route, use_route
from lorasmith.models.batches import make_batch, plan_batches
from lorasmith.models.divergence import TokenPairs, compare_logits
from lorasmith.models.forward import TokenForward
from lorasmith.models.load import LoadedModel
from lorasmith.models.loglik import examine
from lorasmith.models.reordered import ReorderedSums
from lorasmith.models.session import Workload
from lorasmith.models.states import KeptStates, scoring_work
from lorasmith.models.work import RowWork
from lorasmith.progress import Progress

SAMPLE_ROWS = 16
"""Rows on which the adapter is compared with itself, spread over all lengths. Some two hundred tokens give
the floor's mean to a sixth, and a grade asks for a factor of two, where a rounded merge is six orders of
magnitude away; the noise of the serving type varies more from token to token, and decides nothing."""

_ELEMENTS = 1 << 24
"""Logits of one model that exist at one time: 64 MB in float32; a comparison makes some eight such."""


@dataclass(frozen=True)
class Side:
    """What is left of a model once it has run."""

    states: KeptStates
    logits: Callable[[torch.Tensor], torch.Tensor]
    """[n, V] float32 from [n, H]: its head."""
    vocabulary: int
    device: torch.device

    def chunk(self) -> int:
        """Positions whose logits are taken at one time."""
        return max(1, _ELEMENTS // self.vocabulary)

    def of(self, rows: Rows) -> Iterator[torch.Tensor]:
        """The logits at the scored positions of these rows, in pieces of `chunk()`."""
        for part in self.states.of(rows).split(self.chunk()):
            yield self.logits(part.to(self.device))


@dataclass(frozen=True)
class Floor:
    """The adapter against itself."""

    rows: list[TokenPairs]
    layouts: list[str]
    """The two ways in which it was computed."""


def run_side(
    loaded: LoadedModel,
    work: Workload,
    route: Route,
    journal: Journal,
    label: str,
    progress: Progress,
    executor: Executor | None = None,
    recipe: Recipe | None = None,
    log: ChunkLog | None = None,
) -> Side:
    """Fill the journal with the hidden states of all rows, where they are not in it; needs no model after.

    An `executor` elsewhere needs the `recipe` of the work.
    """
    where, how = executor or Local(), recipe or Recipe("", {})
    with keep_memory(), use_route(route):
        forward = examine(loaded, work.rows)
        kept = KeptStates(journal, work.rows)
        if not all(row in kept for row in range(len(work.rows))):
            scoring = scoring_work(forward, work, keep=True)
            with progress(label, total=work.tokens, unit="tok") as advance:
                for rows, _ in where.work_through(work.batches(), scoring, journal, how, log):
                    advance(sum(len(work.rows[row].ids) for row in rows))
            kept = KeptStates(journal, work.rows)
        elif log is not None:
            for rows in journal.chunks():
                log.note_kept(rows, journal)
        return Side(kept, forward.detach(), loaded.vocabulary, loaded.device)


def compare_sides(
    work: Workload, a: Side, b: Side, route: Route, journal: Journal | None, progress: Progress
) -> list[TokenPairs]:
    """The pairs of every row, in the order of the test set."""
    found: dict[int, TokenPairs] = {}
    with (
        keep_memory(),
        use_route(route),
        progress("Compare", total=sum(row.scored for row in work.rows), unit="tok") as advance,
    ):
        comparing = _pair_work(
            work, lambda rows: _split(work, rows, _pairs(work, rows, a.of(rows), b.of(rows)))
        )
        for rows, pairs in work_through(work.batches(), comparing, journal):
            found.update(zip(rows, pairs, strict=True))
            advance(sum(work.rows[row].scored for row in rows))
    return [found[row] for row in range(len(work.rows))]


def _pair_work(work: Workload, action: Callable[[Rows], list[TokenPairs]]) -> RowWork[list[TokenPairs]]:
    return RowWork(
        work.rows,
        torch.device("cpu"),
        action=action,
        to_arrays=lambda rows: [array for row in rows for array in row.arrays()],
        from_arrays=lambda rows, arrays: [
            TokenPairs(*arrays[start : start + len(arrays) // len(rows)])
            for start in range(0, len(arrays), len(arrays) // len(rows))
        ],
    )


def _pairs(
    work: Workload, rows: Rows, logits_a: Iterator[torch.Tensor], logits_b: Iterator[torch.Tensor]
) -> TokenPairs:
    targets = torch.cat([torch.tensor(work.rows[row].ids[work.rows[row].scored_from :]) for row in rows])
    parts, start = [], 0
    for one, two in zip(logits_a, logits_b, strict=True):
        here = targets[start : start + len(one)].to(one.device)
        parts.append(compare_logits(one, two.to(one.device), here))
        start += len(one)
    return TokenPairs.join(parts)


def _split(work: Workload, rows: Rows, pairs: TokenPairs) -> list[TokenPairs]:
    found, start = [], 0
    for row in rows:
        found.append(pairs.part(slice(start, start + work.rows[row].scored)))
        start += work.rows[row].scored
    return found


def noise_floor(loaded: LoadedModel, work: Workload, side: Side, route: Route, progress: Progress) -> Floor:
    """The adapter against itself on a sample of rows: in other batches, every sum in another order."""
    with keep_memory(), use_route(route), examine(loaded, work.rows) as forward:
        found = _against_itself(forward, work, side, ReorderedSums, "Noise floor", progress)
    batches = f"batches of {work.settings.batch_tokens} tokens, {route.label}"
    return Floor(found, [batches, f"{batches}, the terms of every matrix product in another order"])


def serving_floor(loaded: LoadedModel, work: Workload, side: Side, route: Route, progress: Progress) -> Floor:
    """The adapter in the type it is served in (`loaded`) against itself in float32, on a sample of rows."""
    name = str(loaded.model.dtype).removeprefix("torch.")
    low = partial(use_route, Route(name, loaded.model.dtype, name))
    with keep_memory(), use_route(route):
        with low():
            forward = examine(loaded, work.rows)
        with forward:
            found = _against_itself(forward, work, side, low, f"Noise of {name}", progress)
    return Floor(
        found, [f"batches of {work.settings.batch_tokens} tokens, {way}" for way in (route.label, name)]
    )


def _against_itself(
    forward: TokenForward,
    work: Workload,
    side: Side,
    otherwise: Callable[[], AbstractContextManager[object]],
    label: str,
    progress: Progress,
) -> list[TokenPairs]:
    """What `side` keeps of a sample of rows, against the same rows computed inside `otherwise()`."""
    sample = _sample(work)
    lengths = [len(work.rows[row].ids) for row in sample]
    found = []
    with progress(label, total=sum(lengths), unit="tok") as advance:
        for batch in plan_batches(lengths, work.settings.batch_tokens, work.settings.batch_size):
            rows = tuple(sample[place] for place in batch)
            again = _again(forward, work, rows, otherwise, side.chunk())
            found += _split(work, rows, _pairs(work, rows, side.of(rows), again))
            advance(sum(len(work.rows[row].ids) for row in rows))
    return found


def _sample(work: Workload) -> list[int]:
    """At most `SAMPLE_ROWS` rows, spread over all lengths."""
    order = [row for batch in work.batches() for row in batch]
    return order[:: -(-len(order) // SAMPLE_ROWS)]


def _again(
    forward: TokenForward,
    work: Workload,
    rows: Rows,
    otherwise: Callable[[], AbstractContextManager[object]],
    chunk: int,
) -> Iterator[torch.Tensor]:
    """Logits of these rows computed inside `otherwise()`, which is left again between the pieces."""
    pending = forward.logits(make_batch(rows, work.rows).to(forward.device), chunk=chunk)
    for _ in range(-(-sum(work.rows[row].scored for row in rows) // chunk)):
        with otherwise():
            logits = next(pending)
        yield logits


def is_finite(rows: Sequence[TokenPairs]) -> bool:
    """Whether all numbers of the pairs are."""
    return all(np.isfinite(row.kl).all() and np.isfinite(row.logprob_b).all() for row in rows)
