"""The machine and what is installed on it."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from lorasmith.files.digests import cache_folder
from lorasmith.files.machine import available_memory, human_bytes
from lorasmith.preflight.rates import existing
from lorasmith.records.doctor import Check

_CACHE_BYTES = 50_000_000


def environment_checks() -> list[Check]:
    """Libraries, memory, devices, cache."""
    return [*_libraries(), _memory(), _devices(), _cache()]


def _libraries() -> list[Check]:
    """Every dependency against the range that lorasmith declares; those of extras may be absent."""
    wrong, absent, right = [], [], 0
    for line in requires("lorasmith") or []:
        needed = Requirement(line)
        optional = needed.marker is not None and "extra" in str(needed.marker)
        if needed.marker is not None and not optional and not needed.marker.evaluate():
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            if optional:
                absent.append(needed.name)
            else:
                wrong.append(f"{needed.name} is not installed, {needed.specifier} is needed")
            continue
        if needed.specifier.contains(found, prereleases=True):
            right += 1
        else:
            wrong.append(f"{needed.name} {found}, {needed.specifier} is needed")
    checks = []
    if wrong:
        remedy = (
            "pip install 'lorasmith' into a fresh environment; `make` takes the versions it was tested with"
        )
        checks.append(Check(name="libraries", state="error", found="; ".join(wrong), remedy=remedy))
    else:
        checks.append(Check(name="libraries", state="ok", found=f"{right} in their declared ranges"))
    if absent:
        found = f"not installed: {', '.join(sorted(set(absent)))}"
        remedy = "needed by extras only: see `pip install 'lorasmith[…]'`"
        checks.append(Check(name="optional libraries", state="note", found=found, remedy=remedy))
    return checks


def _memory() -> Check:
    return Check(name="memory", state="ok", found=f"{human_bytes(available_memory())} available")


def _devices() -> Check:
    import torch

    found = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            found.append(f"cuda:{number} {name}, {human_bytes(free)} of {human_bytes(total)} free")
    if torch.backends.mps.is_available():
        found.append("mps")
    text = "; ".join([*found, f"cpu, {torch.get_num_threads()} threads"])
    return Check(name="devices", state="ok", found=text)


def _cache() -> Check:
    place = existing(cache_folder())
    free = shutil.disk_usage(place).free
    return _space("cache", place, free, _CACHE_BYTES)


def _space(name: str, place: Path, free: int, needed: int) -> Check:
    found = f"{human_bytes(free)} free at {place}, {human_bytes(needed)} needed"
    if free < needed:
        return Check(name=name, state="error", found=found, remedy="free some space, or choose another disk")
    return Check(name=name, state="ok", found=found)


def disk_check(output: Path, needed: int) -> Check:
    """The disk of the run folder against what the run will leave there."""
    place = existing(output)
    return _space("disk", place, shutil.disk_usage(place).free, needed)
