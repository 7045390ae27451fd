"""What processors and GPUs tell of themselves: energy counters, and how busy a GPU is. Nothing is guessed.

NVIDIA's management library comes with the driver, so it is asked directly: energy since the driver was
loaded, in millijoules (`nvmlDeviceGetTotalEnergyConsumption`, since Volta), and the percentage of the last
sample period in which a kernel ran (`nvmlDeviceGetUtilizationRates`). Processors of Intel and AMD count
microjoules for each package below `/sys/class/powercap` (Linux, driver `intel_rapl`), where often root alone
may read them.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_LIBRARY = "libnvidia-ml.so.1"
_UUID_BYTES = 96
"""As NVML's header says for the second version of the call; the first takes it too."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def machine_name() -> str:
    """What tells this machine from another while it runs: containers on one machine have one, too."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return platform.node()


class Gpus:
    """The NVIDIA GPUs that the driver shows this process."""

    def __init__(self, library: str = _LIBRARY, *, without: Collection[str] = ()) -> None:
        """Those but the ones named in `without`. Without driver or GPU there are none; that is no error."""
        self._handles: list[ctypes.c_void_p] = []
        self.names: list[str] = []
        """Each GPU's own, wherever it is seen."""
        try:
            self._nvml = ctypes.CDLL(library)
            if self._nvml.nvmlInit_v2() != 0:
                return
        except (OSError, AttributeError):
            return
        count = ctypes.c_uint()
        if self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
                name = self._name(handle, index)
                if name not in without:
                    self._handles.append(handle)
                    self.names.append(name)

    def _name(self, handle: ctypes.c_void_p, index: int) -> str:
        """The GPU's UUID, else its number on this machine."""
        text = ctypes.create_string_buffer(_UUID_BYTES)
        with suppress(AttributeError):
            if self._nvml.nvmlDeviceGetUUID(handle, text, _UUID_BYTES) == 0:
                return text.value.decode(errors="replace")
        return f"GPU {index} of {machine_name()}"

    def __len__(self) -> int:
        return len(self._handles)

    def joules(self) -> float | None:
        """Energy of all of them since the driver was loaded; None where one does not tell."""
        total = 0
        for handle in self._handles:
            found = ctypes.c_ulonglong()
            if self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(found)) != 0:
                return None
            total += found.value
        return total / 1e3 if self._handles else None

    def memory(self) -> int | None:
        """Bytes in use on all of them, by whatever process; None where one does not tell."""
        total = 0
        for handle in self._handles:
            found = _Memory()
            if self._nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(found)) != 0:
                return None
            total += found.used
        return total if self._handles else None

    def busy(self) -> float | None:
        """How many of them work just now, as a sum of fractions; None where one does not tell."""
        total = 0.0
        for handle in self._handles:
            found = _Utilization()
            if self._nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(found)) != 0:
                return None
            total += found.gpu / 100
        return total if self._handles else None


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
