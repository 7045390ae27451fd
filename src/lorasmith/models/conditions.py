"""What the last digits of a result may depend on, as it is in this process."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from lorasmith import __version__
from lorasmith.files.machine import hardware
from lorasmith.records.conditions import Conditions

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
