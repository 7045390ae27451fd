"""Every element of every tensor of the merged model against the plan, streaming, on a few threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch

from lorasmith.errors import AdapterError
from lorasmith.proving.weights_compare import (
    Block,
    LoadedTerm,
    Tally,
    compare,
    compare_bytes,
    quick_type,
)
from lorasmith.proving.weights_folder import DTYPES, Index, Stored
from lorasmith.proving.weights_formula import Expected, Term
from lorasmith.proving.weights_rounding import GRIDS

_READ_ELEMENTS = 1 << 22
"""Elements that a thread maps and checks at a time: their pages are resident meanwhile."""
_BLOCK_ELEMENTS = 1 << 16
"""Elements of one step of arithmetic: what it touches stays in a core's own cache."""
_WAITING = 8
"""Tasks that may be under way or waiting for a thread."""


@dataclass
class Checked:
    """One tensor and what was found in it."""

    expected: Expected
    found: Stored
    tally: Tally


@dataclass(frozen=True)
class _Task:
    expected: Expected
    found: Stored
    index: Index
    first_row: int
    terms: tuple[LoadedTerm, ...]


def check(pairs: Iterable[tuple[Expected, Stored]], threads: int | None = None) -> Iterator[Checked]:
    """Compare stored tensors of the right shape with what is expected, in the order given."""
    workers = threads or min(8, os.cpu_count() or 1)
    with _one_thread_per_operation(), ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[_Task, Future[Tally]]] = deque()
        current: Checked | None = None
        for task in _tasks(pairs):
            waiting.append((task, pool.submit(_run, task)))
            if len(waiting) >= _WAITING:
                current, done = _collect(waiting, current)
                if done:
                    yield done
        while waiting:
            current, done = _collect(waiting, current)
            if done:
                yield done
        if current:
            yield current


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    # Blocks run side by side on our own threads; torch's would only get in their way.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _collect(
    waiting: deque[tuple[_Task, Future[Tally]]], current: Checked | None
) -> tuple[Checked, Checked | None]:
    task, future = waiting.popleft()
    tally = future.result()
    if current is not None and current.found == task.found:
        current.tally.add(tally)
        return current, None
    return Checked(task.expected, task.found, tally), current


def _tasks(pairs: Iterable[tuple[Expected, Stored]]) -> Iterator[_Task]:
    for expected, found in pairs:
        terms = tuple(_load(term, expected, found) for term in expected.terms)
        for index, first_row in parts(found.shape, _READ_ELEMENTS):
            yield _Task(expected, found, index, first_row, terms)


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


def _load(term: Term, expected: Expected, found: Stored) -> LoadedTerm:
    left = term.left.load()
    right = torch.ones(1, 1) if term.right is None else term.right.load()
    for factor in (left, right):
        if not bool(torch.isfinite(factor).all()):
            raise AdapterError(
                f"a factor of the update of {found.name!r} is not finite",
                where=term.left.stored.file,
                expected="finite numbers",
                remedy="take a checkpoint of the training from before it diverged",
            )
    grid = GRIDS[found.dtype]
    rank = sum(1 if each.right is None else each.right.load().shape[0] for each in expected.terms)
    kind = quick_type(grid, rank, DTYPES[expected.source.dtype])
    norms = torch.linalg.vector_norm(right.to(torch.float64), dim=0)
    return LoadedTerm(
        term.factor, left, right, term.first_row, right.to(kind).contiguous(), float(norms.max())
    )


def _run(task: _Task) -> Tally:
    found, source = task.found.rows(task.index), task.expected.source.rows(task.index)
    if not task.terms and task.found.dtype == task.expected.source.dtype:
        return compare_bytes(found, source, task.first_row)
    tally = Tally()
    grid, step = GRIDS[task.found.dtype], max(1, _BLOCK_ELEMENTS // found.shape[1])
    for start, end in _cuts(task, len(found), step):
        row = task.first_row + start
        terms = tuple(
            term for term in task.terms if term.first_row <= row < term.first_row + term.left.shape[0]
        )
        tally.add(compare(Block(task.found.name, grid, row, found[start:end], source[start:end], terms)))
    return tally


def _cuts(task: _Task, rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Row ranges that no term begins or ends within."""
    edges = {0, rows}
    for term in task.terms:
        for edge in (term.first_row, term.first_row + term.left.shape[0]):
            if 0 < edge - task.first_row < rows:
                edges.add(edge - task.first_row)
    borders = sorted(edges)
    for low, high in pairwise(borders):
        for start in range(low, high, step):
            yield start, min(start + step, high)
