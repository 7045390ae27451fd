"""Energy and busy time of devices: a driver of NVIDIA and a kernel's counters, in small."""

from __future__ import annotations

import ctypes
import subprocess
import threading
import time
from pathlib import Path

import pynvml
import pytest

from lorasmith.machine.meter import Gpus, Meter, Packages, this_machine

# Two GPUs of 250 W together: energy since "the driver was loaded" grows with the clock. The state of the
# library is set by a file, so that a test can break a GPU while it runs.
DRIVER = r"""
#include <stdio.h>
#include <time.h>
static int broken(void) { FILE *f = fopen("BROKEN", "r"); if (f) fclose(f); return f != 0; }
static double now(void) {
    struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)(long)(i + 1); return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *mj) {
    if (broken()) return 3;
    *mj = 5000000000000ULL + (unsigned long long)(now() * 1000 * ((long)h == 1 ? 200 : 50)); return 0; }
int nvmlDeviceGetUtilizationRates(void *h, unsigned *rates) {
    if (broken()) return 3;
    rates[0] = (long)h == 1 ? 100 : 50; rates[1] = 7; return 0; }
int nvmlDeviceGetMemoryInfo(void *h, unsigned long long *m) {
    m[0] = 80000000000ULL; m[2] = (long)h == 1 ? 30000000000ULL : 1; m[1] = m[0] - m[2]; return 0; }
"""


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without NVIDIA's driver, whatever the tests run on."""
    load_driver(monkeypatch, Path("no-such-library.so"))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library with NVML's functions and types in the place of the driver's."""
    source, built = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(DRIVER.replace("BROKEN", str(tmp_path / "broken")))
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", built, source], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs a C compiler")
    load_driver(monkeypatch, built)


def load_driver(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    """Let pynvml load this library, as if it had loaded none yet."""
    monkeypatch.setattr(pynvml, "CDLL", lambda name: ctypes.CDLL(str(library)))
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})


def a_package(root: Path, name: str, zone: str, value: int, limit: int = 262_143_328_850) -> Path:
    folder = root / zone
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", str(value)), ("max_energy_range_uj", str(limit))):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_gpus_tell_their_energy_and_how_busy_they_are(driver: None, tmp_path: Path) -> None:
    gpus = Gpus()
    assert len(gpus) == 2 and gpus.busy() == 1.5 and gpus.memory() == 30_000_000_001
    with Meter(gpus, Packages(tmp_path / "none"), seconds=0.05).running() as usage:
        began = time.perf_counter()
        time.sleep(0.4)
        wall = time.perf_counter() - began
    # 200 W + 50 W, 1.5 GPUs busy; the readings before and after the block take their time too.
    assert usage.gpu_joules == pytest.approx(250 * wall, rel=0.2)
    assert usage.gpu_seconds == pytest.approx(1.5 * wall, rel=0.2)
    assert usage.gpu_peak_bytes == 30_000_000_001
    assert usage.cpu_joules is None
    (tmp_path / "broken").touch()
    with Meter(gpus, Packages(tmp_path / "none")).running() as usage:
        pass
    assert usage.gpu_joules is None and usage.gpu_seconds is None


def test_a_gpu_that_falls_silent_makes_the_sum_unknown(driver: None, tmp_path: Path) -> None:
    with Meter(Gpus(), Packages(tmp_path), seconds=0.02).running() as usage:
        time.sleep(0.1)
        (tmp_path / "broken").touch()
        time.sleep(0.1)
        (tmp_path / "broken").unlink()
    assert usage.gpu_seconds is None
    assert usage.gpu_joules is not None  # a counter since the driver was loaded: the gap is in it


def count(counter: Path, microjoules: int) -> None:
    """Go on to this value: at no moment is there no number, as in a kernel."""
    following = counter.with_name("following")
    following.write_text(f"{microjoules}\n")
    following.replace(counter)


def test_packages_are_summed_and_may_run_over(no_driver: None, tmp_path: Path) -> None:
    one = a_package(tmp_path, "package-0", "intel-rapl:0", 1_000_000)
    two = a_package(tmp_path, "package-1", "intel-rapl:1", 9_500_000, limit=9_999_999)
    a_package(tmp_path, "core", "intel-rapl:0:0", 5)  # a part of package 0
    board = a_package(tmp_path, "psys", "intel-rapl:2", 5)  # all of it once more
    with Meter(Gpus(), Packages(tmp_path), seconds=0.02).running() as usage:
        count(one, 3_000_000)
        time.sleep(0.1)
        count(one, 4_000_000)
        count(two, 500_000)  # from 9.5 J over the end at 10 J
        count(board, 999_999)
    assert usage.cpu_joules == pytest.approx(3.0 + 1.0)
    assert usage.gpu_seconds is None and usage.gpu_joules is None and usage.gpu_peak_bytes is None


def test_counters_that_cannot_be_read_are_not_measured(no_driver: None, tmp_path: Path) -> None:
    counter = a_package(tmp_path, "package-0", "intel-rapl:0", 1)
    packages = Packages(tmp_path)
    with Meter(Gpus(), packages).running() as usage:
        counter.unlink()
    assert usage.cpu_joules is None
    assert Packages(tmp_path).read() == {}
    threads = threading.active_count()
    with Meter(Gpus(), Packages(tmp_path)).running():
        assert threading.active_count() == threads  # nobody to ask: nothing is sampled
    with this_machine().running():
        pass


def test_the_block_ends_as_it_would_without_a_meter(driver: None, tmp_path: Path) -> None:
    with pytest.raises(KeyError), Meter(Gpus(), Packages(tmp_path)).running():
        raise KeyError("x")
