"""What a stage takes from the devices, as far as they tell: busy seconds and memory of GPUs, and energy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from lorasmith.files.devices import Gpus, Packages

SAMPLE_SECONDS = 0.5
"""NVML's own sample period lies between 1/6 s and 1 s; a package's counter runs over after minutes."""


@dataclass
class Usage:
    """Of one stage; what no device tells is None."""

    gpu_seconds: float | None = None
    """Sum over the GPUs of utilisation times time, sampled."""
    gpu_peak_bytes: int | None = None
    """Most memory in use on all GPUs at a time, sampled."""
    gpu_joules: float | None = None
    cpu_joules: float | None = None
    """Of all devices that this process can see, whoever used them."""


class Meter:
    """Reads the devices before, after, and now and then in between."""

    def __init__(self, gpus: Gpus, packages: Packages, seconds: float = SAMPLE_SECONDS) -> None:
        self._gpus, self._packages, self._seconds = gpus, packages, seconds

    @property
    def devices(self) -> frozenset[str]:
        """Names of the devices that tell something; the same wherever they are seen."""
        return frozenset([*self._gpus.names, *self._packages.names])

    @contextmanager
    def running(self) -> Iterator[Usage]:
        """The figures of the block; they are complete once it has ended."""
        usage = Usage()
        counters = self._packages.read()
        if not len(self._gpus) and not counters:  # nobody to ask: no thread either
            yield usage
            return
        joules, last = self._gpus.joules(), time.perf_counter()
        busy: list[float | None] = []
        energy: list[float | None] = []
        memory: list[int | None] = [self._gpus.memory()]
        over = threading.Event()

        def sample() -> None:
            nonlocal counters, last
            now, found = time.perf_counter(), self._packages.read()
            share = self._gpus.busy()
            busy.append(None if share is None else share * (now - last))
            energy.append(self._packages.used(counters, found))
            memory.append(self._gpus.memory())
            counters, last = found, now

        def keep_sampling() -> None:
            while not over.wait(self._seconds):
                sample()

        thread = threading.Thread(target=keep_sampling, daemon=True)
        thread.start()
        try:
            yield usage
        finally:
            over.set()
            thread.join()
            sample()
            end = self._gpus.joules()
            usage.gpu_seconds, usage.cpu_joules = _sum(busy), _sum(energy)
            usage.gpu_peak_bytes = _most(memory)
            usage.gpu_joules = None if joules is None or end is None else round(end - joules, 3)


def _sum(parts: list[float | None]) -> float | None:
    """None where one is missing: the sum of the others would look like the whole."""
    known = [part for part in parts if part is not None]
    return round(sum(known), 3) if len(known) == len(parts) else None


def _most(parts: list[int | None]) -> int | None:
    known = [part for part in parts if part is not None]
    return max(known) if len(known) == len(parts) else None


@cache
def this_machine() -> Meter:
    """The meter of the devices that are here; they are looked for once."""
    return Meter(Gpus(), Packages())
