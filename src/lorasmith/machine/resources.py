"""What this machine has: disk space and memory before the work, peak memory after it."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from lorasmith.errors import DiskError, os_errors


def require_disk(folder: Path, needed: int, doing: str) -> None:
    """Raise `DiskError` unless `needed` bytes and 1 % of slack are free where `folder` is or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    with os_errors(place, "look at the free space"):
        state = os.statvfs(place)
    free = state.f_bavail * state.f_frsize
    wanted = needed + needed // 100
    if free < wanted:
        raise DiskError(
            f"too little disk space to {doing}: {human_bytes(free)} are free",
            where=folder,
            expected=f"{human_bytes(wanted)} free",
            remedy="free some space, or choose another disk",
        )


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be had without swapping: what is free here, or what the container (`group`) leaves."""
    free: int = psutil.virtual_memory().available
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free  # no container, or one without a limit ("max")
    # Pages of files that nobody uses are given back before anything fails.
    return max(0, min(free, limit - used + int(fields.get("inactive_file", 0))))


def human_bytes(count: float) -> str:
    """`269.1 MB`: decimal units, as disks and networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def return_memory() -> None:
    """Give freed memory back to the system, so that one stage's peak is not counted for the next."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only the GNU C library has it
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> bool:
    """Start a new measurement of peak resident memory; False where the kernel cannot (only Linux can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Peak resident memory in bytes since the last reset, else since the process began."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and system, for `timing.json`."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# Work that must not take longer than is paid for.


class OutOfTime(BaseException):
    """The time is over: unwinds the stack as Ctrl-C does, so that no handler of errors takes it for one."""


@contextmanager
def stop_after(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` within the block once so many seconds have passed; None for no end.

    By the system's alarm, which reaches the main thread alone: elsewhere the block runs to its end.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    if seconds <= 0:
        raise OutOfTime

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
