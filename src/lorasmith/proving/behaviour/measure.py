"""Adapter, adapter again, merged model: run one after the other, then compared token by token.

Of each model the hidden states at the scored positions stay, on disk, and its head in memory. So the two need
not fit into memory together, and what validation has kept is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.errors import UsageError
from lorasmith.executors.base import map_chunks
from lorasmith.files.journal import Journal, Rows
from lorasmith.machine.allocator import keep_memory
from lorasmith.models.batches import make_batch, plan_batches
from lorasmith.models.device import Route, use_route
from lorasmith.models.forward import TokenForward
from lorasmith.models.hidden_states import KeptStates, open_scoring
from lorasmith.models.load import LoadedModel
from lorasmith.models.reordered import ReorderedSums
from lorasmith.models.scorer import Scorer
from lorasmith.models.scoring import RowWork, examine, open_forward
from lorasmith.models.session import Workload
from lorasmith.models.statistics import (
    Array,
    TokenPairs,
    clustered_error,
    compare_logits,
    group_fields,
    group_rows,
    mean_interval,
    perplexity,
)
from lorasmith.progress import Progress
from lorasmith.records.dataset import Example
from lorasmith.records.proof import ExampleComparison, Flip, KLStatistics, TokenComparison

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


def run_side(scorer: Scorer, label: str) -> Side:
    """Fill the scorer's journal with the hidden states of all rows, where they are not in it.

    The rest of the model is not needed after it where its head alone gives the logits.
    """
    loaded, work, journal = scorer.loaded, scorer.work, scorer.journal
    assert journal is not None, "hidden states lie in a journal"
    states = KeptStates(journal, work.rows)
    if not all(row in states for row in range(len(work.rows))):
        scorer.run(open_scoring, work.batches(), label, unit="tok", keep=True)
        states = KeptStates(journal, work.rows)
    else:
        for rows in journal.chunks():
            scorer.log.note_kept(rows, journal)
    with keep_memory(), use_route(scorer.route):
        return Side(states, examine(loaded, work.rows).detach(), loaded.vocabulary, loaded.device)


def compare_sides(
    work: Workload, a: Side, b: Side, route: Route, journal: Journal | None, progress: Progress
) -> list[TokenPairs]:
    """The pairs of every row, in the order of the test set."""
    pairs_by_row: dict[int, TokenPairs] = {}
    with (
        keep_memory(),
        use_route(route),
        progress("Compare", total=sum(row.scored for row in work.rows), unit="tok") as advance,
    ):
        comparing = _pair_work(
            work, lambda rows: _split(work, rows, _pairs(work, rows, a.of(rows), b.of(rows)))
        )
        for rows, pairs in map_chunks(work.batches(), comparing, journal):
            pairs_by_row.update(zip(rows, pairs, strict=True))
            advance(sum(work.rows[row].scored for row in rows))
    return [pairs_by_row[row] for row in range(len(work.rows))]


def _pair_work(
    work: Workload, action: Callable[[Rows], list[TokenPairs]]
) -> RowWork[list[TokenPairs], TokenPairs]:
    return RowWork(
        work.rows,
        torch.device("cpu"),
        action=action,
        to_arrays=lambda rows: [array for row in rows for array in row.arrays()],
        from_arrays=lambda rows, arrays: [
            TokenPairs(*arrays[start : start + len(arrays) // len(rows)])
            for start in range(0, len(arrays), len(arrays) // len(rows))
        ],
        per_row=lambda rows: rows,
    )


def _pairs(
    work: Workload, rows: Rows, logits_a: Iterator[torch.Tensor], logits_b: Iterator[torch.Tensor]
) -> TokenPairs:
    targets = torch.cat([torch.tensor(work.rows[row].targets) for row in rows])
    parts, start = [], 0
    for one, two in zip(logits_a, logits_b, strict=True):
        here = targets[start : start + len(one)].to(one.device)
        parts.append(compare_logits(one, two.to(one.device), here))
        start += len(one)
    return TokenPairs.join(parts)


def _split(work: Workload, rows: Rows, pairs: TokenPairs) -> list[TokenPairs]:
    by_row, start = [], 0
    for row in rows:
        by_row.append(pairs.part(slice(start, start + work.rows[row].scored)))
        start += work.rows[row].scored
    return by_row


def noise_floor(scorer: Scorer, side: Side) -> Floor:
    """The adapter against itself on a sample of rows: in other batches, every sum in another order."""
    work = scorer.work
    with open_forward(scorer.loaded, work.rows, scorer.route) as forward:
        pairs = _against_itself(forward, work, side, ReorderedSums, "Noise floor", scorer.progress)
    batches = f"batches of {work.settings.batch_tokens} tokens, {scorer.route.label}"
    return Floor(pairs, [batches, f"{batches}, the terms of every matrix product in another order"])


def serving_floor(loaded: LoadedModel, work: Workload, side: Side, route: Route, progress: Progress) -> Floor:
    """The adapter in the type it is served in (`loaded`) against itself in float32, on a sample of rows."""
    name = str(loaded.model.dtype).removeprefix("torch.")
    low = partial(use_route, Route(name, loaded.model.dtype, name))
    with keep_memory(), use_route(route):
        with low():
            forward = examine(loaded, work.rows)
        with forward:
            pairs = _against_itself(forward, work, side, low, f"Noise of {name}", progress)
    return Floor(
        pairs, [f"batches of {work.settings.batch_tokens} tokens, {way}" for way in (route.label, name)]
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
    pairs = []
    with progress(label, total=sum(lengths), unit="tok") as advance:
        for batch in plan_batches(lengths, work.settings.batch_tokens, work.settings.batch_size):
            rows = tuple(sample[place] for place in batch)
            again = _again(forward, work, rows, otherwise, side.chunk())
            pairs += _split(work, rows, _pairs(work, rows, side.of(rows), again))
            advance(sum(len(work.rows[row].ids) for row in rows))
    return pairs


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


# Which grade a comparison earns, and the numbers that decide it.


THRESHOLDS: Mapping[str, float] = {
    "loss_delta": 1e-4,
    "perplexity_delta": 0.01,
    "mean_kl": 1e-4,
    "top1_agreement": 0.995,
    "floor_factor": 2.0,
}
"""`faithful` asks for less than the first three and at least the fourth; `indistinguishable` for a mean KL
within `floor_factor` times the floor."""


def resolve_thresholds(given: Mapping[str, float] | None) -> dict[str, float]:
    """The defaults with the caller's in place; raises `UsageError` for an unknown name."""
    unknown = sorted(set(given or {}) - set(THRESHOLDS))
    if unknown:
        raise UsageError(f"there is no threshold {unknown[0]!r}", expected=" | ".join(THRESHOLDS))
    return {**THRESHOLDS, **(given or {})}


def grade(
    overall: TokenComparison,
    floor: TokenComparison,
    thresholds: Mapping[str, float],
    obstacles: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """`indistinguishable`, `faithful` or `drifted`, with reasons; `obstacles` alone make it `drifted`."""
    factor = thresholds["floor_factor"]
    limit = factor * floor.kl.mean
    within = overall.kl.mean <= limit
    reasons = [
        f"mean KL {overall.kl.mean:.3g} is {'within' if within else 'above'} {factor:g} × the floor "
        f"{floor.kl.mean:.3g}"
    ]
    checks = [
        (
            abs(overall.loss_delta) < thresholds["loss_delta"],
            "|loss Δ|",
            abs(overall.loss_delta),
            "loss_delta",
        ),
        (
            abs(overall.perplexity_delta) < thresholds["perplexity_delta"],
            "|perplexity Δ|",
            abs(overall.perplexity_delta),
            "perplexity_delta",
        ),
        (overall.kl.mean < thresholds["mean_kl"], "mean KL", overall.kl.mean, "mean_kl"),
    ]
    for passed, label, value, name in checks:
        reasons.append(f"{label} {value:.3g} is {'below' if passed else 'not below'} {thresholds[name]:g}")
    agrees = overall.top1_agreement >= thresholds["top1_agreement"]
    reasons.append(
        f"top-1 agreement {100 * overall.top1_agreement:.3f} % is {'at least' if agrees else 'below'} "
        f"{100 * thresholds['top1_agreement']:g} %"
    )
    if obstacles:
        return "drifted", [*obstacles, *reasons]
    if within:
        return "indistinguishable", reasons
    if agrees and all(passed for passed, *_ in checks):
        return "faithful", reasons
    return "drifted", reasons


# From numbers per token to the comparison of two models, over all examples and by group.


def summarise(rows: Sequence[TokenPairs], seed: int) -> TokenComparison:
    """Compare two models over some examples, given the pairs of each; sums are taken in float64."""
    tokens = TokenPairs.join(rows)
    counts = np.array([len(row) for row in rows], dtype=np.float64)
    a, b = tokens.logprob_a.astype(np.float64), tokens.logprob_b.astype(np.float64)
    loss_a, loss_b = float(-a.mean()), float(-b.mean())
    delta_p = np.exp(b) - np.exp(a)
    return TokenComparison(
        examples=len(rows),
        tokens=len(tokens),
        loss_a=loss_a,
        loss_b=loss_b,
        loss_delta=float((a - b).mean()),
        loss_delta_interval=mean_interval(per_row(a - b, counts), counts, seed),
        perplexity_a=perplexity(loss_a),
        perplexity_b=perplexity(loss_b),
        perplexity_delta=perplexity(loss_b) - perplexity(loss_a),
        perplexity_ratio=perplexity(float((a - b).mean())),
        kl=kl_statistics(tokens.kl.astype(np.float64), counts),
        delta_p_mean=float(delta_p.mean()),
        delta_p_rms=float(np.sqrt(np.mean(delta_p**2))),
        top1_agreement=float(np.mean(tokens.top_a == tokens.top_b)),
        max_abs_delta=float(np.abs(a - b).max()),
    )


def per_row(values: npt.NDArray[np.float64], counts: Array) -> Array:
    """Sums over the tokens of each example."""
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    return np.add.reduceat(values, starts)


def kl_statistics(kl: npt.NDArray[np.float64], counts: Array) -> KLStatistics:
    """Mean with its standard error (examples as clusters of tokens), quantiles and maximum."""
    median, q90, q95, q99, q999 = (float(q) for q in np.quantile(kl, [0.5, 0.9, 0.95, 0.99, 0.999]))
    return KLStatistics(
        mean=float(kl.mean()),
        standard_error=clustered_error(per_row(kl, counts), counts),
        median=median,
        q90=q90,
        q95=q95,
        q99=q99,
        q999=q999,
        max=float(kl.max()),
    )


def by_group(
    examples: Sequence[Example], rows: Sequence[TokenPairs], seed: int
) -> dict[str, dict[str, TokenComparison]]:
    """The comparison for every group and crossing of groups."""
    grouped = group_rows([group_fields(example) for example in examples])
    return {
        dimension: {
            name: summarise([rows[place] for place in places], seed) for name, places in groups.items()
        }
        for dimension, groups in grouped.items()
    }


def flips(examples: Sequence[Example], rows: Sequence[TokenPairs]) -> list[Flip]:
    """Every scored position where the two models prefer different tokens."""
    return [
        Flip(
            example=example.id,
            position=int(place),
            token_a=int(row.top_a[place]),
            token_b=int(row.top_b[place]),
            margin=float(row.margin[place]),
        )
        for example, row in zip(examples, rows, strict=True)
        for place in np.flatnonzero(row.top_a != row.top_b)
    ]


def per_example(examples: Sequence[Example], rows: Sequence[TokenPairs]) -> list[ExampleComparison]:
    """One line for each example."""
    compared = []
    for example, row in zip(examples, rows, strict=True):
        difference = row.logprob_a.astype(np.float64) - row.logprob_b
        compared.append(
            ExampleComparison(
                id=example.id,
                tokens=len(row),
                loss_delta=float(difference.mean()),
                mean_kl=float(row.kl.mean(dtype=np.float64)),
                max_abs_delta=float(np.abs(difference).max()),
                flips=int(np.count_nonzero(row.top_a != row.top_b)),
            )
        )
    return compared
