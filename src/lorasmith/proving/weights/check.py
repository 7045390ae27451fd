"""Every tensor of the merged model against the plan: its parts on a few threads, in the order given."""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, lru_cache
from itertools import pairwise
from math import prod

import numpy as np
import torch

from lorasmith.errors import AdapterError
from lorasmith.machine.allocator import keep_memory
from lorasmith.progress import Advance
from lorasmith.proving.weights.blocks import (
    FIRST,
    UNIT,
    Gain,
    LoadedTerm,
    RowBlock,
    Tally,
    Wrong,
    gamma,
    make_gain,
    sums,
)
from lorasmith.proving.weights.dither import Dither, doubtful_dithered, make_dither
from lorasmith.proving.weights.formula import Expected, Term
from lorasmith.proving.weights.judge import exact_sum, judge_elements, row_gain
from lorasmith.proving.weights.model_folder import DTYPES, Index, ProvenTensor
from lorasmith.proving.weights.quick import doubtful, quick_type
from lorasmith.proving.weights.rounding import GRIDS, Grid, Ints

_SLOW_ELEMENTS = 1 << 13
"""Elements judged slowly at a time, so that memory stays small when all are wrong."""


def compare(block: RowBlock) -> Tally:
    """Check every element of the block."""
    if block.magnitudes is not None:
        block = replace(block, gain=row_gain(block, block.magnitudes))
    tally = Tally(elements=block.stored.numel())
    dither = _dither_of(block)
    open_ = doubtful(block) if dither is None else doubtful_dithered(block, dither)
    for start in range(0, len(open_), _SLOW_ELEMENTS):
        tally.add(judge_elements(block, open_[start : start + _SLOW_ELEMENTS], dither))
    return tally


def _dither_of(block: RowBlock) -> Dither | None:
    """The stream of a dithered tensor; rows that nothing is added to are rounded to nearest all the same."""
    if block.seed is None or not (block.terms or block.gain):
        return None
    return make_dither(block.seed, block.name, block.stored.shape[1])


def compare_bytes(stored: torch.Tensor, source: torch.Tensor, first_row: int) -> Tally:
    """Check a tensor that nothing changes: it has the base's bytes, signs of zeros and NaNs included.

    Both are matrices of one type. The distance of integers is their difference, of numbers the count of
    numbers between.
    """
    # Compared as integers, because NaN is unequal to itself and the two zeros are equal.
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.dtype.itemsize]
    a, b = stored.view(integer), source.view(integer)
    if torch.equal(a, b):
        return Tally(elements=stored.numel())
    flat = a.ne(b).reshape(-1).nonzero().view(-1)
    tally = Tally(elements=stored.numel())
    stored, source = stored.reshape(-1)[flat], source.reshape(-1)[flat]
    tally.count(np.maximum(_steps(stored, source), 1))
    for k in range(min(FIRST, len(flat))):
        row, column = divmod(int(flat[k]), a.shape[1])
        far = int(np.maximum(_steps(stored[k : k + 1], source[k : k + 1]), 1)[0])
        tally.first.append(Wrong(first_row + row, column, _show(stored[k]), _show(source[k]), far))
    return tally


def _steps(a: torch.Tensor, b: torch.Tensor) -> Ints:
    """Distances of stored numbers of one type, at most 2⁶²."""
    if a.dtype.is_floating_point:
        # Read as integers, floating-point numbers of one sign stand in their order; the negative ones are
        # turned over, so that both signs stand in one line.
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
        least = torch.iinfo(width).min
        a, b = (torch.where(bits < 0, least - 1 - bits, bits) for bits in (a.view(width), b.view(width)))
    steps = (a.double() - b.double()).abs().clamp(max=2.0**62)
    return steps.long().numpy()


def _show(value: torch.Tensor) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


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
    stored: ProvenTensor
    index: Index
    first_row: int
    terms: tuple[LoadedTerm, ...]
    magnitudes: torch.Tensor | None = None
    gain: Gain | None = None


def tasks(pairs: Iterable[tuple[Expected, ProvenTensor]]) -> Iterator[Task]:
    """The parts of stored tensors of the right shape, in order, each with the factors that it needs."""
    for expected, stored in pairs:
        grid = GRIDS.get(stored.dtype)
        terms = tuple(load_term(term, expected, grid) for term in expected.terms)
        magnitudes, gain = None, None
        if expected.magnitude:
            magnitudes = expected.magnitude.stored.whole().reshape(-1)
            if not expected.magnitude.per_row:
                gain = _column_gain(expected, terms, magnitudes)
        for index, first_row in parts(stored.shape, _READ_ELEMENTS):
            yield Task(expected, stored, index, first_row, terms, magnitudes, gain)


def _column_gain(expected: Expected, terms: tuple[LoadedTerm, ...], magnitudes: torch.Tensor) -> Gain:
    """The gain of each column, whose norms take all rows: known before any block can be checked."""
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
def whole(stored: ProvenTensor) -> torch.Tensor:
    """A factor tensor; the experts of a layer all take their parts of the same ones."""
    return stored.whole()


def load_term(term: Term, expected: Expected, grid: Grid | None) -> LoadedTerm:
    """A term with its factors at hand, ready for a grid of floats; for any other in float64.

    Raises `AdapterError` for factors that are not finite or vanish in float64.
    """
    left = term.left.view(whole(term.left.stored))
    right = torch.ones(1, 1) if term.right is None else term.right.view(whole(term.right.stored))
    for factor in (left, right):
        if not bool(torch.isfinite(factor).all()):
            raise AdapterError(
                f"a factor of the update of {expected.name!r} is not finite",
                where=term.left.stored.file,
                expected="finite numbers",
                remedy="take a checkpoint of the training from before it diverged",
            )
        sizes = factor.abs()
        if factor.dtype == torch.float64 and bool(((sizes > 0) & (sizes < _LEAST_FACTOR)).any()):
            raise AdapterError(
                f"a factor of the update of {expected.name!r} holds numbers below {_LEAST_FACTOR:.0e}",
                where=term.left.stored.file,
                expected="larger numbers, or zeros: products of such numbers vanish in float64",
            )
    source = DTYPES[expected.source.dtype]
    kind = torch.float64 if grid is None else quick_type(grid, left.shape[1], source)
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
    return task.stored.rows(task.index), task.expected.source.rows(task.index)


def run(task: Task, stored: torch.Tensor, own: torch.Tensor) -> Tally:
    """Check every element of the part, with the rows that `fetch` gave."""
    tally = Tally()
    same = task.stored.dtype == task.expected.source.dtype
    for start, end, source in _segments(task, own, len(stored)):
        row = task.first_row + start
        if same and source.dtype == stored.dtype and not task.terms and not task.expected.magnitude:
            tally.add(compare_bytes(stored[start:end], source, row))
            continue
        for low, high in _cuts(task, row, row + len(source)):
            tally.add(compare(_block(task, stored, source, row, low, high)))
    return tally


def _block(task: Task, stored: torch.Tensor, source: torch.Tensor, row: int, low: int, high: int) -> RowBlock:
    """The block of rows `low` to `high` of the matrix; `source` begins at `row`."""
    terms = tuple(term for term in task.terms if term.first_row <= low < term.first_row + term.left.shape[0])
    per_row = task.magnitudes is not None and task.gain is None
    return RowBlock(
        task.stored.name,
        GRIDS[task.stored.dtype],
        low,
        stored[low - task.first_row : high - task.first_row],
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
    step = max(1, (_NORM_ELEMENTS if task.expected.magnitude else _READ_ELEMENTS) // task.stored.columns)
    for low, high in pairwise(sorted(edges)):
        for start in range(low, high, step):
            yield start, min(start + step, high)


_HANDED_OVER = 1 << 14
"""Elements from which a tensor is checked on another thread."""
_READERS = 3
"""Threads that read and hash ahead of the arithmetic: while two hash, the disk has one more to serve."""
_SWITCH_SECONDS = 2e-5
"""How long a thread waits for Python's lock, which all of them need for a moment between long operations."""
_WAITING = 8
"""Tasks that may be under way, being read or waiting for a thread."""


@dataclass
class Checked:
    """One tensor of the merge, and the tally of its elements."""

    expected: Expected
    stored: ProvenTensor
    tally: Tally


def check(
    pairs: Iterable[tuple[Expected, ProvenTensor]], *, advance: Advance | None = None
) -> Iterator[Checked]:
    """Compare stored tensors of the right shape with what is expected, in the order given.

    `advance` is told the bytes of the merge that have just been checked.
    """
    workers = min(8, os.cpu_count() or 1)
    # A file may have been written anew since the last proof in this process.
    whole.cache_clear()
    with (
        keep_memory(),
        one_thread_per_operation(),
        ThreadPoolExecutor(_READERS) as readers,
        ThreadPoolExecutor(workers) as pool,
    ):
        waiting: deque[tuple[Task, Future[Tally]]] = deque()
        current: Checked | None = None
        for task in tasks(pairs):
            waiting.append((task, _start(readers, pool, task)))
            if len(waiting) >= _WAITING:
                current, done = _collect(waiting, current, advance)
                if done:
                    yield done
        while waiting:
            current, done = _collect(waiting, current, advance)
            if done:
                yield done
        if current:
            yield current


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Blocks run side by side on threads of our own meanwhile."""
    # Blocks run side by side on our own threads; torch's would only get in their way.
    before, switch = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        sys.setswitchinterval(switch)


def _start(readers: ThreadPoolExecutor, pool: ThreadPoolExecutor, task: Task) -> Future[Tally]:
    """On threads of its own, or here and now where handing it over would take longer than doing it."""
    if task.stored.elements > _HANDED_OVER:
        rows = readers.submit(fetch, task)
        return pool.submit(lambda: run(task, *rows.result()))
    done: Future[Tally] = Future()
    done.set_result(run(task, *fetch(task)))
    return done


def _collect(
    waiting: deque[tuple[Task, Future[Tally]]], current: Checked | None, advance: Advance | None
) -> tuple[Checked, Checked | None]:
    """Take in the oldest task: the tensor it belongs to, and the one before it if that is complete."""
    task, future = waiting.popleft()
    tally = future.result()
    if advance:
        advance(tally.elements * DTYPES[task.stored.dtype].itemsize)
    if current is not None and current.stored == task.stored:
        current.tally.add(tally)
        return current, None
    return Checked(task.expected, task.stored, tally), current
