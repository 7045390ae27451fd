"""The check cut into parts that a thread can hold: every element of a tensor, with what its formula needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from itertools import pairwise
from math import prod

import torch

from lorasmith.errors import AdapterError
from lorasmith.proving.weights_compare import compare, compare_bytes
from lorasmith.proving.weights_exact import exact_sum
from lorasmith.proving.weights_formula import Expected, Term
from lorasmith.proving.weights_gain import UNIT, Gain, gamma, make_gain
from lorasmith.proving.weights_quick import quick_type
from lorasmith.proving.weights_rounding import GRIDS
from lorasmith.proving.weights_stored import DTYPES, Index, Stored
from lorasmith.proving.weights_tally import Tally
from lorasmith.proving.weights_terms import Block, LoadedTerm, sums

_READ_ELEMENTS = 1 << 22
"""Elements that a thread maps and checks at a time: their pages are resident meanwhile."""
_NORM_ELEMENTS = 1 << 18
"""Elements whose sums are held in float64 at a time while norms are taken."""
_LEAST_FACTOR = 2.0**-400
"""Squares of anything larger are far from vanishing in float64, so that a norm of 0 means zeros."""


@dataclass(frozen=True)
class Task:
    """A part of one tensor."""

    expected: Expected
    found: Stored
    index: Index
    first_row: int
    terms: tuple[LoadedTerm, ...]
    magnitudes: torch.Tensor | None = None
    gain: Gain | None = None


def tasks(pairs: Iterable[tuple[Expected, Stored]]) -> Iterator[Task]:
    """The parts of stored tensors of the right shape, in order, each with the factors that it needs."""
    for expected, found in pairs:
        terms = tuple(_load(term, expected, found) for term in expected.terms)
        magnitudes, gain = None, None
        if expected.magnitude:
            magnitudes = expected.magnitude.stored.whole().reshape(-1)
            if not expected.magnitude.per_row:
                gain = _column_gain(expected, terms, magnitudes)
        for index, first_row in parts(found.shape, _READ_ELEMENTS):
            yield Task(expected, found, index, first_row, terms, magnitudes, gain)


def _column_gain(expected: Expected, terms: tuple[LoadedTerm, ...], magnitudes: torch.Tensor) -> Gain:
    """Norms over all rows, before any block can be checked."""
    source = expected.source
    squares = torch.zeros(source.columns, dtype=torch.float64)
    reaches, bound, blocks = torch.zeros(1, dtype=torch.float64), 0.0, 0
    step = max(1, _NORM_ELEMENTS // source.columns)
    for start in range(0, source.shape[0], step):
        rows = source.rows((slice(start, min(start + step, source.shape[0])),))
        v, reach, bound = sums(rows, terms, start, torch.float64)
        squares += v.square().sum(dim=0)
        reaches += reach.square().sum()
        blocks += 1
    spread = bound * (squares.sqrt() + 2 * reaches.sqrt())

    def exact_square(column: int) -> Fraction:
        total = Fraction(0)
        for start in range(0, source.shape[0], step):
            rows = source.rows((slice(start, min(start + step, source.shape[0])),))
            for at, value in enumerate(rows[:, column].tolist()):
                total += exact_sum(terms, value, start + at, column) ** 2
        return total

    return make_gain(
        squares,
        spread,
        gamma(step + blocks + 3, UNIT),
        magnitudes,
        per_row=False,
        exact_square=cache(exact_square),
        name=expected.name,
    )


def parts(shape: tuple[int, ...], most: int) -> Iterator[tuple[Index, int]]:
    """Slices of at most about `most` elements, each with the row of the matrix that it begins with."""
    if not shape:
        yield (), 0
        return
    if prod(shape) == 0:
        return
    inner = prod(shape[1:])
    rows_each = prod(shape[1:-1])
    if inner > most and len(shape) > 2:
        for outer in range(shape[0]):
            for index, row in parts(shape[1:], most):
                yield (outer, *index), outer * rows_each + row
        return
    step = max(1, most // inner)
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])),), start * rows_each


@lru_cache(maxsize=16)
def whole(stored: Stored) -> torch.Tensor:
    """A factor tensor; the experts of a layer all take their parts of the same ones."""
    return stored.whole()


def _load(term: Term, expected: Expected, found: Stored) -> LoadedTerm:
    left = term.left.view(whole(term.left.stored))
    right = torch.ones(1, 1) if term.right is None else term.right.view(whole(term.right.stored))
    for factor in (left, right):
        if not bool(torch.isfinite(factor).all()):
            raise AdapterError(
                f"a factor of the update of {found.name!r} is not finite",
                where=term.left.stored.file,
                expected="finite numbers",
                remedy="take a checkpoint of the training from before it diverged",
            )
        sizes = factor.abs()
        if factor.dtype == torch.float64 and bool(((sizes > 0) & (sizes < _LEAST_FACTOR)).any()):
            raise AdapterError(
                f"a factor of the update of {found.name!r} holds numbers below {_LEAST_FACTOR:.0e}",
                where=term.left.stored.file,
                expected="larger numbers, or zeros: products of such numbers vanish in float64",
            )
    grid = GRIDS[found.dtype]
    kind = quick_type(grid, left.shape[1], DTYPES[expected.source.dtype])
    norms = torch.linalg.vector_norm(right.to(torch.float64), dim=0)
    return LoadedTerm(
        term.factor,
        left,
        right,
        term.first_row,
        right.to(kind).contiguous(),
        right.T.contiguous(),
        norms,
        float(norms.max()),
    )


def fetch(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the part as they are in the merge, and as they are in what it was made from."""
    return task.found.rows(task.index), task.expected.source.rows(task.index)


def run(task: Task, found: torch.Tensor, own: torch.Tensor) -> Tally:
    """Check every element of the part, with the rows that `fetch` gave."""
    tally = Tally()
    same = task.found.dtype == task.expected.source.dtype
    for start, end, source in _segments(task, own, len(found)):
        row = task.first_row + start
        if same and source.dtype == found.dtype and not task.terms and not task.expected.magnitude:
            tally.add(compare_bytes(found[start:end], source, row))
            continue
        for low, high in _cuts(task, row, row + len(source)):
            tally.add(compare(_block(task, found, source, row, low, high)))
    return tally


def _block(task: Task, found: torch.Tensor, source: torch.Tensor, row: int, low: int, high: int) -> Block:
    """The block of rows `low` to `high` of the matrix; `source` begins at `row`."""
    terms = tuple(term for term in task.terms if term.first_row <= low < term.first_row + term.left.shape[0])
    per_row = task.magnitudes is not None and task.gain is None
    return Block(
        task.found.name,
        GRIDS[task.found.dtype],
        low,
        found[low - task.first_row : high - task.first_row],
        source[low - row : high - row],
        terms,
        task.magnitudes[low:high] if per_row and task.magnitudes is not None else None,
        task.gain,
        task.expected.seed,
    )


def _segments(task: Task, own: torch.Tensor, rows: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Row ranges of the part and their source: its own rows, or single ones that another tensor replaces."""
    first, replaced = 0, task.expected.rows
    for row in sorted(row for row in replaced if task.first_row <= row < task.first_row + rows):
        at = row - task.first_row
        if at > first:
            yield first, at, own[first:at]
        stored, position = replaced[row]
        yield at, at + 1, stored.rows((slice(position, position + 1),))
        first = at + 1
    if first < rows:
        yield first, rows, own[first:]


def _cuts(task: Task, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Row ranges of the matrix that no term begins or ends within, short where norms need whole rows."""
    edges = {first, last}
    for term in task.terms:
        for edge in (term.first_row, term.first_row + term.left.shape[0]):
            if first < edge < last:
                edges.add(edge)
    step = max(1, (_NORM_ELEMENTS if task.expected.magnitude else _READ_ELEMENTS) // task.found.columns)
    for low, high in pairwise(sorted(edges)):
        for start in range(low, high, step):
            yield start, min(start + step, high)
