"""Which float32 route the processor takes: chosen by measured speed and error, never left switched on.

On some x86 processors torch sends float32 products to a slow path of its BLAS, while oneDNN has a float32
kernel of twice the speed at the same error. torch has no switch of that name: asking oneDNN for "bf16" is
what reaches that kernel where the processor has no matrix unit for bfloat16, but where it has one, the same
switch really computes in bfloat16. So the probe looks at the error against float64 and not at the
processor's name.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorasmith import __version__
from lorasmith.errors import LorasmithError, UsageError
from lorasmith.files.atomic import write_bytes
from lorasmith.files.digests import cache_folder
from lorasmith.machine.resources import hardware
from lorasmith.records.scoring import Conditions

ARITHMETICS = ("auto", "mkl", "onednn", "bfloat16")
"""What a caller may ask for: `mkl` is torch's own float32 route (MKL on x86), `bfloat16` is not exact."""

_FASTER = 1.05
"""oneDNN must be this much faster. Where it was the better one it led by 1.1 to 1.5, idle or busy; near a tie
nothing is lost by staying."""
_WORSE = 3.0
"""Largest ratio of the errors. Two float32 kernels differ by less than 3 through their order of summation;
bfloat16 products are 1,000 times worse than either."""

_KERNELS = {"LRU_CACHE_CAPACITY": "512", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512"}
"""How many kernels torch and oneDNN keep, one for each shape of a product. By themselves they keep 1,024 of
half a megabyte each, and packs hardly ever have equal shapes; the layers of one pack need 300 at most. They
hold for every route: products in bfloat16 go to oneDNN as well, whichever way float32 takes."""


@dataclass(frozen=True)
class Route:
    """One way to compute a product."""

    name: str
    """`mkl`, `onednn`, `bfloat16`, or `device` where the device has only one float32 route."""
    dtype: torch.dtype
    label: str
    """As it stands in `ScoringSettings.arithmetic`."""


_ROUTES = {
    "mkl": Route("mkl", torch.float32, "float32"),
    "onednn": Route("onednn", torch.float32, "float32 (oneDNN)"),
    "bfloat16": Route("bfloat16", torch.bfloat16, "bfloat16"),
}


@dataclass(frozen=True)
class Probe:
    """What the probe measured."""

    mkl_seconds: float
    onednn_seconds: float
    mkl_error: float
    onednn_error: float
    """Largest error against float64, relative to the largest element of the product."""


def choose_route(asked: str, device: torch.device) -> Route:
    """The route for `asked` on `device`; raises `UsageError` for one that cannot be had."""
    if asked not in ARITHMETICS:
        raise UsageError(f"there is no arithmetic {asked!r}", expected=" | ".join(ARITHMETICS))
    if asked == "onednn" and not _has_onednn(device):
        raise UsageError(
            f"the oneDNN route does not exist on {device}", remedy="leave the arithmetic at auto"
        )
    if asked == "onednn" and len(float32_routes(device)) == 1:
        raise UsageError(
            "on this processor the oneDNN route computes in bfloat16",
            expected="a route as accurate as float32",
            remedy="leave the arithmetic at auto, or give --arithmetic bfloat16, which is not exact",
        )
    if asked != "auto":
        return _ROUTES[asked]
    return _ROUTES["onednn" if _has_onednn(device) and prefers_onednn(probe()) else "mkl"]


def float32_routes(device: torch.device) -> list[Route]:
    """torch's own route and, where `device` has it and it does not compute in bfloat16 there, oneDNN's."""
    if _has_onednn(device) and _accurate(probe()):
        return [_ROUTES["mkl"], _ROUTES["onednn"]]
    return [_ROUTES["mkl"]]


def _has_onednn(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.mkldnn.is_available()


def prefers_onednn(measured: Probe) -> bool:
    """Clearly faster, and as accurate as float32 is."""
    faster = measured.mkl_seconds >= _FASTER * measured.onednn_seconds
    return faster and _accurate(measured)


def _accurate(measured: Probe) -> bool:
    """Whether the oneDNN route is a float32 route on this processor."""
    return measured.onednn_error <= _WORSE * measured.mkl_error


@cache
def probe() -> Probe:
    """What this machine measured the first time it was asked; afterwards read from lorasmith's cache.

    The first decision stands for a processor, a torch version and a number of threads: near a tie, a busy
    moment would otherwise turn the choice and with it the last digits of every result. It also stands for
    the instructions that oneDNN is held to, since without its matrix unit a processor has another answer.
    """
    about = f"{hardware()['processor']} torch {torch.__version__} threads {torch.get_num_threads()} {_SHAPES}"
    about += "".join(f" {name}={os.environ[name]}" for name in _INSTRUCTIONS if name in os.environ)
    file = cache_folder() / f"arithmetic-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
    try:
        return Probe(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        measured = measure()
    with suppress(LorasmithError):  # a cache that cannot be written costs a second, not the result
        write_bytes(file, json.dumps(asdict(measured)).encode())
    return measured


_INSTRUCTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables by which a person keeps oneDNN from some of the processor's instructions."""

_SHAPES = ((1024, 576, 1536), (1024, 1536, 576), (512, 768, 4096))
"""Rows, inputs and outputs of the products that are timed: a batch through the layers of a small model, and
some scored positions through a head."""


def measure(repeats: int = 9) -> Probe:
    """Time and check float32 products on both routes, by turns; the sum of the best times of each shape."""
    generator = torch.Generator().manual_seed(0)
    seconds, errors = {"mkl": 0.0, "onednn": 0.0}, {"mkl": 0.0, "onednn": 0.0}
    for rows, inputs, outputs in _SHAPES:
        left = torch.randn(rows, inputs, generator=generator)
        right = torch.randn(outputs, inputs, generator=generator)
        reference = left.double() @ right.double().T
        best = dict.fromkeys(seconds, float("inf"))
        for _ in range(repeats):
            for name in best:
                with use_route(_ROUTES[name]):
                    start = time.perf_counter()
                    product = torch.nn.functional.linear(left, right)
                    best[name] = min(best[name], time.perf_counter() - start)
                error = float((product.double() - reference).abs().max() / reference.abs().max())
                errors[name] = max(errors[name], error)
        for name, value in best.items():
            seconds[name] += value
    return Probe(seconds["mkl"], seconds["onednn"], errors["mkl"], errors["onednn"])


@contextmanager
def use_route(route: Route) -> Iterator[None]:
    """Compute by `route` inside the block: no gradients, no TF32; every switch is put back afterwards."""
    onednn: Any = torch.backends.mkldnn  # its annotations lack `matmul`
    matmul, cuda, cudnn = onednn.matmul, torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.fp32_precision, cuda.fp32_precision, cudnn.fp32_precision)
    for name, count in _KERNELS.items():
        os.environ.setdefault(name, count)  # both are read with the first product that reaches oneDNN
    try:
        matmul.fp32_precision = "bf16" if route.name == "onednn" else "ieee"
        cuda.fp32_precision = cudnn.fp32_precision = "ieee"
        with torch.inference_mode():
            yield
    finally:
        matmul.fp32_precision, cuda.fp32_precision, cudnn.fp32_precision = before


def resolve_device(asked: str) -> torch.device:
    """`auto` is the first of CUDA, MPS and CPU that is there; raises `UsageError` for one that is not."""
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise UsageError(
            f"there is no device {asked!r}", expected="auto, cpu, cuda, cuda:1 or mps"
        ) from error
    missing = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise UsageError(f"this machine has no device {asked!r}", remedy="give --device auto or cpu")
    return device


# What the last digits of a result may depend on, as it is in this process.


_LIBRARIES = ("torch", "transformers", "peft")
_FEATURES = ("avx", "fma", "amx", "f16c", "asimd", "sve", "bf16", "i8mm")
"""How the flags begin that choose a kernel, on x86 and ARM."""


def conditions_of(device: torch.device) -> Conditions:
    """Device, processor, features, versions and threads of this process."""
    return _conditions(device, torch.get_num_threads())


@cache
def _conditions(device: torch.device, threads: int) -> Conditions:
    versions = {"lorasmith": __version__, **{name: version(name) for name in _LIBRARIES}}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        processor, features = torch.cuda.get_device_name(device), [f"capability {major}.{minor}"]
        versions["cuda"] = str(torch.version.cuda)
    else:
        processor = str(hardware()["processor"])
        features = [*_flags(), f"torch {torch.backends.cpu.get_cpu_capability()}"]
    return Conditions(
        device=device.type,
        processor=processor,
        features=features,
        versions=versions,
        threads=threads,
    )


@cache
def _flags() -> list[str]:
    """The processor's own list, where the system tells it (Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return sorted(flag for flag in set(values.split()) if flag.startswith(_FEATURES))
    return []


# Memory: telling its lack from a bug, and giving back what a failed attempt holds.


_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a memory object",
    "cannot allocate memory",
    "bad_alloc",
)
"""What torch's allocators, oneDNN, the system and C++ say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` or what caused it says that memory ran out, on the host or a device."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(cause, (RuntimeError, OSError)) and any(sign in str(cause).lower() for sign in _SIGNS):
            return True
        cause = cause.__cause__
    return False


def release_memory() -> None:
    """Give back what a failed attempt still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
