"""This machine's rates, measured in about a second."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from lorasmith.errors import os_errors
from lorasmith.preflight.estimate import Rates

_SIDE = 1024
_ROUNDS = 5
_WRITTEN = 64 << 20


def measure_rates(folder: Path, device: str = "auto", arithmetic: str = "auto") -> Rates:
    """Products on the device that would score, and writes to the disk where the run would lie."""
    return Rates(flops=_flops(device, arithmetic), write_bytes=_writing(existing(folder)))


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def _flops(device: str, arithmetic: str) -> float:
    """The best of some products: a busy moment must not decide."""
    import torch

    from lorasmith.models.arithmetic import choose_route, resolve_device, use_route

    place = resolve_device(device)
    route = choose_route(arithmetic, place)
    one, two = (torch.randn(_SIDE, _SIDE, device=place, dtype=route.dtype) for _ in range(2))
    best = float("inf")
    with use_route(route):
        for _ in range(_ROUNDS + 1):
            began = time.perf_counter()
            _wait(one @ two)
            best = min(best, time.perf_counter() - began)
    return 2 * _SIDE**3 / best


def _wait(product: object) -> None:
    """Until a device that works on its own has finished: reading one element waits for it."""
    float(product[0, 0])  # type: ignore[index]


def _writing(folder: Path) -> float:
    block = os.urandom(1 << 20)
    with os_errors(folder, "write a file to time the disk"), tempfile.TemporaryFile(dir=folder) as handle:
        began = time.perf_counter()
        for _ in range(_WRITTEN >> 20):
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
        return _WRITTEN / max(time.perf_counter() - began, 1e-9)
