"""This machine's rates, measured in about two seconds."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.errors import os_errors
from lorasmith.preflight.estimate import Rates

if TYPE_CHECKING:
    import torch

    from lorasmith.models.device import Route

_SIDE = 1024
_ROUNDS = 5
_WRITTEN = 64 << 20
_READ = 64 << 20
"""More than fits in the cache of most processors."""
_PACKED = 16 << 20
_RANK = 16


def measure_rates(folder: Path, device: str = "auto", arithmetic: str = "auto") -> Rates:
    """Products and reads on the device that would score, writes to the disk where the run would lie, and the
    work of a merge and of packing on this machine's cores.
    """
    from lorasmith.models.device import choose_route, resolve_device

    place = resolve_device(device)
    route = choose_route(arithmetic, place)
    return Rates(
        flops=_flops(route, place),
        write_bytes=_writing(existing(folder)),
        read_bytes=_reading(place),
        round_bytes=_rounding(),
        pack_bytes=_packing(),
    )


def _best(action: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Seconds of the fastest of some tries, the first one left out: a busy moment must not decide."""
    action()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def _flops(route: Route, place: torch.device) -> float:
    import torch

    from lorasmith.models.device import use_route

    one, two = (torch.randn(_SIDE, _SIDE, device=place, dtype=route.dtype) for _ in range(2))
    with use_route(route):
        return 2 * _SIDE**3 / _best(lambda: _wait(one @ two))


def _reading(place: torch.device) -> float:
    import torch

    values = torch.ones(_READ >> 2, device=place)
    return _READ / _best(lambda: float(values.sum()))


def _rounding() -> float:
    """What a merge does to each element: a float64 sum with a low-rank product, rounded to bfloat16."""
    import torch

    stored = torch.randn(2 * _SIDE, _SIDE).to(torch.bfloat16)
    one, two = torch.randn(2 * _SIDE, _RANK).double(), torch.randn(_RANK, _SIDE).double()
    seconds = _best(lambda: torch.addmm(stored.double(), one, two).float().to(torch.bfloat16))
    return 2 * stored.numel() / seconds


def _packing() -> float:
    """Random bfloat16 weights through the archives' compressor, hashed as members and stream are."""
    import torch

    from lorasmith.packaging.compress import find_compression

    block = torch.randn(_SIDE, _SIDE // 2).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()

    def pack() -> None:
        with find_compression("gzip").writer(io.BytesIO()) as write:
            for _ in range(_PACKED // len(block)):
                for _ in range(2):
                    hashlib.sha256(block)
                write(block)

    return _PACKED / _best(pack, 2)


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
