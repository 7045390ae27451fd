"""What a stage takes from the devices, as far as they tell: busy seconds and memory of GPUs, and energy."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pynvml

# What processors and GPUs tell of themselves: energy counters, and how busy a GPU is. Nothing is guessed.
#
# NVIDIA's management library, which comes with the driver, tells a GPU's energy since the driver was loaded,
# in millijoules (since Volta), and the percentage of the last sample period in which a kernel ran.
# Processors of Intel and AMD count microjoules for each package below `/sys/class/powercap` (Linux, driver
# `intel_rapl`), where often root alone may read them.


POWERCAP = Path("/sys/class/powercap")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def machine_name() -> str:
    """What tells this machine from another while it runs: containers on one machine have one, too."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return platform.node()


class Gpus:
    """The NVIDIA GPUs that the driver shows this process."""

    def __init__(self, *, without: Collection[str] = ()) -> None:
        """Those but the ones named in `without`. Without driver or GPU there are none; that is no error."""
        self._handles: list[Any] = []
        self.names: list[str] = []
        """Each GPU's own, wherever it is seen."""
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError:
            return
        for index in range(count):
            with suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                name = _gpu_name(handle, index)
                if name not in without:
                    self._handles.append(handle)
                    self.names.append(name)

    def __len__(self) -> int:
        return len(self._handles)

    def joules(self) -> float | None:
        """Energy of all of them since the driver was loaded; None where one does not tell."""
        millijoules = self._sum(pynvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1e3

    def memory(self) -> int | None:
        """Bytes in use on all of them, by whatever process; None where one does not tell."""
        return self._sum(lambda handle: pynvml.nvmlDeviceGetMemoryInfo(handle).used)

    def busy(self) -> float | None:
        """How many of them work just now, as a sum of fractions; None where one does not tell."""
        percent = self._sum(lambda handle: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        return None if percent is None else percent / 100

    def _sum(self, ask: Callable[[Any], int]) -> int | None:
        try:
            return sum(ask(handle) for handle in self._handles) if self._handles else None
        except pynvml.NVMLError:
            return None


def _gpu_name(handle: Any, index: int) -> str:
    """The GPU's UUID, else its number on this machine."""
    with suppress(pynvml.NVMLError):
        return str(pynvml.nvmlDeviceGetUUID(handle))
    return f"GPU {index} of {machine_name()}"


class Packages:
    """The energy counters of the processor packages; each runs over, after minutes to hours."""

    def __init__(self, root: Path | None = None, *, without: Collection[str] = ()) -> None:
        """Find the counters below `root`, by default the system's; none where `without` names these."""
        self._counters: dict[Path, int] = {}
        """Counter → the value at which it begins anew, in microjoules."""
        name = f"processors of {machine_name()}"
        zones = [] if name in without else sorted((root or POWERCAP).glob("intel-rapl:*"))
        for zone in zones:
            # `intel-rapl:0` is a package, `intel-rapl:0:1` a part of it; `psys`, the board, overlaps both.
            if zone.name.count(":") != 1:
                continue
            with suppress(OSError, ValueError):
                if (zone / "name").read_text().startswith("package"):
                    int((zone / "energy_uj").read_text())
                    self._counters[zone / "energy_uj"] = int((zone / "max_energy_range_uj").read_text())

        self.names = [name] if self._counters else []
        """The name under which all packages of this machine are counted together."""

    def read(self) -> dict[Path, int]:
        """Each counter in microjoules; one that cannot be read any more is left out."""
        values = {}
        for counter in self._counters:
            with suppress(OSError, ValueError):
                values[counter] = int(counter.read_text())
        return values

    def used(self, before: dict[Path, int], after: dict[Path, int]) -> float | None:
        """Joules between two readings, of which at most one overflow lies in between; None for no counter."""
        if not after or set(before) != set(after):
            return None
        return (
            sum(
                after[counter] - value + (self._counters[counter] + 1 if after[counter] < value else 0)
                for counter, value in before.items()
            )
            / 1e6
        )


SAMPLE_SECONDS = 0.5
"""NVML's own sample period lies between 1/6 s and 1 s; a package's counter runs over after minutes."""


@dataclass
class Usage:
    """Device time, memory and energy of one stage; what no device tells is None."""

    gpu_seconds: float | None = None
    """Sum over the GPUs of utilisation times time, sampled."""
    gpu_peak_bytes: int | None = None
    """Most memory in use on all GPUs at a time, sampled."""
    gpu_joules: float | None = None
    cpu_joules: float | None = None
    """Energy of all devices that this process can see, whoever used them."""


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
            now, reading = time.perf_counter(), self._packages.read()
            share = self._gpus.busy()
            busy.append(None if share is None else share * (now - last))
            energy.append(self._packages.used(counters, reading))
            memory.append(self._gpus.memory())
            counters, last = reading, now

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
    """The sum of all parts, or None where one is missing: the sum of the others would look like the whole."""
    known = [part for part in parts if part is not None]
    return round(sum(known), 3) if len(known) == len(parts) else None


def _most(parts: list[int | None]) -> int | None:
    known = [part for part in parts if part is not None]
    return max(known) if len(known) == len(parts) else None


@cache
def this_machine() -> Meter:
    """The meter of the devices that are here; they are looked for once."""
    return Meter(Gpus(), Packages())


# What other processes and machines took for a stage that runs here, as far as they tell.


@dataclass
class WorkerUsage:
    """Processor time and memory that a cluster's workers took for one stage."""

    cpu_seconds: float = 0.0
    peak_rss_bytes: int | None = None
    """Peak memory of the largest of the processes; None where there is none, or none tells."""
    machines: list[Usage | None] = field(default_factory=list)
    """Each machine's devices; None for one that was lost with its counts."""

    def with_these(self, here: Usage) -> Usage:
        """All devices together: of each figure the sum of those that tell it.

        None where a machine was lost: the sum of the others would look like the whole.
        """
        known = [one for one in self.machines if one is not None]
        if not self.machines:
            return here
        if len(known) < len(self.machines):
            return Usage()
        together = Usage()
        for name in vars(together):
            values = [value for one in (here, *known) if (value := getattr(one, name)) is not None]
            setattr(together, name, round(sum(values), 3) if values else None)
        return together


_open: list[WorkerUsage] = []
"""The stages under way, the innermost last."""


@contextmanager
def counted() -> Iterator[WorkerUsage]:
    """Gather what other processes and machines report within the block."""
    _open.append(WorkerUsage())
    try:
        yield _open[-1]
    finally:
        _open.pop()


def note_process(cpu_seconds: float, peak_rss_bytes: int | None) -> None:
    """Add another process's time to the stage under way, and its peak memory where that is the largest."""
    for stage in _open[-1:]:
        stage.cpu_seconds += cpu_seconds
        if peak_rss_bytes is not None:
            stage.peak_rss_bytes = max(stage.peak_rss_bytes or 0, peak_rss_bytes)


def note_machine(usage: Usage | None) -> None:
    """Devices of another machine took so much; None for a machine that was lost."""
    for stage in _open[-1:]:
        stage.machines.append(usage)
