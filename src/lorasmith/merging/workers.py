"""Threads for the arithmetic, each with its own memory, and one thread of a math library within each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")
R = TypeVar("R")


class Scratch:
    """Arrays that one thread uses for block after block, so that they stay in its core's cache."""

    def __init__(self) -> None:
        self._size = 0

    def of(self, elements: int) -> Scratch:
        """The same arrays, at least this long."""
        if elements > self._size:
            self._size = elements
            self.double = torch.empty(elements, dtype=torch.float64)
            self.single = torch.empty(elements, dtype=torch.float32)
            self.ints = torch.empty(elements, dtype=torch.int32)
            self.shorts = np.empty(elements, dtype=np.int16)
            self.long_bits = np.empty(0, dtype=np.int64)
            self.flags = np.empty(elements, dtype=np.bool_)
        return self

    def longs(self, elements: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """64-bit integers, which only float32 results need."""
        if len(self.long_bits) < elements:
            self.long_bits = np.empty(elements, dtype=np.int64)
        return self.long_bits


class Workers:
    """A pool for pieces of a tensor; while it is open, torch uses one thread per piece."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or max(1, min(8, len(os.sched_getaffinity(0))))
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(
            self.count, "merge-compute", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._before = 0

    def scratch(self) -> Scratch:
        """The calling thread's own arrays."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        return self._local.scratch

    def map(self, work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
        """`work` on every part, in order; a single part runs in the calling thread."""
        if len(parts) == 1:
            return [work(parts[0])]
        return list(self._pool.map(work, parts))

    def __enter__(self) -> Workers:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._before)
