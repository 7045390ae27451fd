"""Every tensor of the merged model against the plan: its parts on a few threads, in the order given."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lorasmith.files.allocator import keep_memory
from lorasmith.progress import Advance
from lorasmith.proving.weights_formula import Expected
from lorasmith.proving.weights_parts import Task, fetch, run, tasks, whole
from lorasmith.proving.weights_stored import DTYPES, Stored
from lorasmith.proving.weights_tally import Tally

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
    """One tensor and what was found in it."""

    expected: Expected
    found: Stored
    tally: Tally


def check(pairs: Iterable[tuple[Expected, Stored]], *, advance: Advance | None = None) -> Iterator[Checked]:
    """Compare stored tensors of the right shape with what is expected, in the order given.

    `advance` is told the bytes of the merge that have just been checked.
    """
    workers = min(8, os.cpu_count() or 1)
    # A file may have been written anew since the last proof in this process.
    whole.cache_clear()
    with (
        keep_memory(),
        _one_thread_per_operation(),
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
def _one_thread_per_operation() -> Iterator[None]:
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
    if task.found.elements > _HANDED_OVER:
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
        advance(tally.elements * DTYPES[task.found.dtype].itemsize)
    if current is not None and current.found == task.found:
        current.tally.add(tally)
        return current, None
    return Checked(task.expected, task.found, tally), current
