"""What processors and GPUs tell of themselves: energy counters, and how busy a GPU is. Nothing is guessed.

NVIDIA's management library, which comes with the driver, tells a GPU's energy since the driver was loaded, in
millijoules (since Volta), and the percentage of the last sample period in which a kernel ran. Processors of
Intel and AMD count microjoules for each package below `/sys/class/powercap` (Linux, driver `intel_rapl`),
where often root alone may read them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import pynvml

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
        """Below `root`, by default the system's; none where `without` names those of this machine."""
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
        """Of all packages of this machine together."""

    def read(self) -> dict[Path, int]:
        """Each counter in microjoules; one that cannot be read any more is left out."""
        found = {}
        for counter in self._counters:
            with suppress(OSError, ValueError):
                found[counter] = int(counter.read_text())
        return found

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
