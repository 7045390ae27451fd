"""Threads for the arithmetic, each with its own memory, and one thread of a math library within each."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

T = TypeVar("T")
R = TypeVar("R")

_SHAPES = 16
"""Shapes of blocks whose arrays a thread keeps ready."""

_SWITCH_SECONDS = 2e-5
"""How long a thread that wants Python's lock waits for it. These threads need it for a moment between long
sums: with Python's own 5 ms two of them were 1.3 times as fast as one, with this 1.5 to 1.6 times."""


class Arrays:
    """What a thread needs for a block of `height` × `width`; kept, as making views costs as much as a sum."""

    def __init__(self, storage: Storage, height: int, width: int) -> None:
        count = height * width
        self._storage = storage
        self.flat = storage.double[:count]
        self.double = self.flat.view(height, width)
        self.single = storage.single[:count].view(height, width)
        self.single_bits = self.single.view(torch.int32)
        self.ints = storage.ints[:count].view(height, width)
        self.int_array = self.ints.numpy()
        self.shorts = storage.shorts[:count].reshape(height, width)
        self.flags = storage.flags[:count].reshape(height, width)

    @property
    def longs(self) -> npt.NDArray[np.int64]:
        """64-bit integers, which float32 and dithered results need."""
        return self._storage.longs[: len(self.flat)].reshape(self.flags.shape)


class Storage:
    """The memory of one thread's arrays."""

    def __init__(self, elements: int) -> None:
        self.double = torch.empty(elements, dtype=torch.float64)
        self.single = torch.empty(elements, dtype=torch.float32)
        self.ints = torch.empty(elements, dtype=torch.int32)
        self.shorts = np.empty(elements, dtype=np.int16)
        self.flags = np.empty(elements, dtype=np.bool_)

    @cached_property
    def longs(self) -> npt.NDArray[np.int64]:
        """Made when they are asked for first."""
        return np.empty(len(self.flags), dtype=np.int64)


class Scratch:
    """Arrays that one thread uses for block after block, so that they stay in its core's cache."""

    def __init__(self) -> None:
        self._storage = Storage(0)
        self._known: dict[tuple[int, int], Arrays] = {}

    def of(self, height: int, width: int) -> Arrays:
        """Arrays of this shape; those of all shapes share their memory."""
        arrays = self._known.get((height, width))
        if arrays is None:
            elements = height * width
            larger = elements > len(self._storage.flags)
            if larger or len(self._known) == _SHAPES:
                self._known.clear()
            if larger:
                self._storage = Storage(elements)
            arrays = self._known[height, width] = Arrays(self._storage, height, width)
        return arrays


class Workers:
    """A pool for pieces of a tensor; while it is open, torch uses one thread per piece."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or max(1, min(8, len(os.sched_getaffinity(0))))
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(
            self.count, "merge-compute", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._before = (0, 0.0)

    def scratch(self) -> Scratch:
        """The calling thread's own arrays."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        return self._local.scratch

    def map(self, work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
        """`work` on every part, in order; a single part runs in the calling thread."""
        if len(parts) == 1:
            return [work(parts[0])]
        return self.begin(work, parts)()

    def begin(self, work: Callable[[T], R], parts: Sequence[T]) -> Callable[[], list[R]]:
        """Begin `work` on every part; what comes back waits for it and gives the results in order."""
        jobs = [self._pool.submit(work, part) for part in parts]

        def results() -> list[R]:
            wait(jobs)  # all of them, also where one fails: no thread may go on with memory that is given up
            return [job.result() for job in jobs]

        return results

    def __enter__(self) -> Workers:
        # Torch's own threads would fight with these for the same processors.
        self._before = (torch.get_num_threads(), sys.getswitchinterval())
        torch.set_num_threads(1)
        sys.setswitchinterval(_SWITCH_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._before[0])
        sys.setswitchinterval(self._before[1])
