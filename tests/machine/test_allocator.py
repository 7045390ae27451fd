"""Kept memory: batches find their pages again, and the process gives them back at the end."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorasmith.machine import allocator
from lorasmith.machine.allocator import keep_memory

ON_GLIBC = platform.libc_ver()[0] == "glibc"

FAULTS = """
import resource, sys, torch
from contextlib import nullcontext
from lorasmith.machine.resources import peak_memory, reset_peak_memory
from lorasmith.machine.allocator import keep_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (9, 17, 40, 80, 33) * times:  # MB, above and below the library's own threshold
        torch.empty(size << 18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keep_memory() if sys.argv[1] == "keep" else nullcontext():
    faults(2)
    print(faults(5))
reset_peak_memory()
print(peak_memory() >> 20)
"""


def run(way: str) -> tuple[int, int]:
    """Page faults of 25 tensors once the first ten are gone, and MiB resident afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, way],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    faults, resident = map(int, done.stdout.split())
    return faults, resident


@pytest.mark.skipif(not ON_GLIBC, reason="only the GNU C library can be told")
def test_memory_is_found_again_and_given_back_in_the_end() -> None:
    (plain, before), (kept, after) = run("plain"), run("keep")
    assert plain > 10_000  # 900 MB in pages of 4 kB would be 230,000; large pages make them fewer
    assert kept < plain / 20
    assert after < before + 30


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_allocator", lambda: None)
    with keep_memory():
        assert float(torch.ones(3).sum()) == 3.0
