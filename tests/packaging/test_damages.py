"""Hundreds of random damages to packages and unpacked packages: each one is found."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.errors import LorasmithError
from lorasmith.packaging.pack import pack
from lorasmith.packaging.unpack import unpack
from lorasmith.packaging.verify import verify
from tests.samples import sample_run

DAMAGES = 150
"""For each of the two kinds of folder; about a tenth of a second for ten."""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in _files(folder)}


def flip_a_bit(folder: Path, chance: random.Random) -> str:
    """Turn one bit of one file."""
    path = chance.choice([path for path in _files(folder) if path.stat().st_size])
    data = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(data)), chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} of {path.name}"


def cut(folder: Path, chance: random.Random) -> str:
    """Cut the end off a file."""
    path = chance.choice([path for path in _files(folder) if path.stat().st_size])
    keep = chance.randrange(path.stat().st_size)
    os.truncate(path, keep)
    return f"{path.name} cut to {keep}"


def append(folder: Path, chance: random.Random) -> str:
    """Add bytes to a file."""
    path = chance.choice(_files(folder))
    with path.open("ab") as handle:
        handle.write(chance.choice([b"\0", b"\n", b" ", bytes(512), b"}"]))
    return f"{path.name} grew"


def remove(folder: Path, chance: random.Random) -> str:
    """Remove a file."""
    path = chance.choice(_files(folder))
    path.unlink()
    return f"{path.name} removed"


def add(folder: Path, chance: random.Random) -> str:
    """Add a file."""
    place = chance.choice(_files(folder)).parent
    path = place / chance.choice(["extra.bin", ".hidden", "model-00002.safetensors", "SHA256SUMS.bak"])
    path.write_bytes(b"not of this package")
    return f"{path.name} added"


def swap(folder: Path, chance: random.Random) -> str:
    """Exchange the contents of two files that differ."""
    while True:
        one, two = chance.sample(_files(folder), 2)
        left, right = one.read_bytes(), two.read_bytes()
        if left != right:
            one.write_bytes(right)
            two.write_bytes(left)
            return f"{one.name} and {two.name} swapped"


def rename(folder: Path, chance: random.Random) -> str:
    """Give a file another name."""
    path = chance.choice(_files(folder))
    path.rename(path.with_name(path.name + "x"))
    return f"{path.name} renamed"


def link(folder: Path, chance: random.Random) -> str:
    """Put a link to the same content in a file's place."""
    path = chance.choice(
        [path for path in _files(folder) if path.name not in ("SHA256SUMS", "manifest.json")]
    )
    aside = folder.parent / f"{folder.name}-target"
    path.rename(aside)
    path.symlink_to(aside)
    return f"{path.name} is a link"


def fill(folder: Path, chance: random.Random) -> str:
    """Overwrite a block with zeros, as a failing disk does."""
    path = chance.choice([path for path in _files(folder) if any(path.read_bytes())])
    data = bytearray(path.read_bytes())
    while True:
        start = chance.randrange(len(data))
        if any(data[start : start + 512]):
            data[start : start + 512] = bytes(len(data[start : start + 512]))
            path.write_bytes(data)
            return f"{path.name} zeroed from {start}"


KINDS: list[Callable[[Path, random.Random], str]] = [
    flip_a_bit,
    flip_a_bit,
    flip_a_bit,
    cut,
    append,
    remove,
    add,
    swap,
    rename,
    link,
    fill,
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package in parts, and the same one unpacked."""
    folder = tmp_path_factory.mktemp("whole")
    pack(sample_run(folder / "run", count=10), folder / "package", part_size=9_000)
    unpack([folder / "package"], folder / "unpacked")
    return folder


@pytest.mark.parametrize("kind", ["package", "unpacked"])
def test_every_damage_is_found(whole: Path, tmp_path: Path, kind: str) -> None:
    assert verify(whole / kind) == []
    chance = random.Random(20261122)
    missed = []
    for number in range(DAMAGES):
        folder = tmp_path / str(number)
        shutil.copytree(whole / kind, folder)
        what = KINDS[number % len(KINDS)](folder, chance)
        found = verify(folder)
        if not any(finding.severity == "error" for finding in found):
            missed.append(what)
        shutil.rmtree(folder)
    assert missed == []


def test_no_damaged_package_is_unpacked(whole: Path, tmp_path: Path) -> None:
    chance = random.Random(7)
    for number in range(60):
        folder = tmp_path / str(number)
        shutil.copytree(whole / "package", folder)
        kind = KINDS[number % len(KINDS)]
        what = kind(folder, chance)
        try:
            unpack([folder], tmp_path / "out")
        except LorasmithError:
            assert not (tmp_path / "out").exists(), what
        else:
            # What lies beside the archives may be lost or added; what comes out is right all the same.
            assert kind in (add, remove, rename, flip_a_bit), what
            assert verify(tmp_path / "out") == [], what
            for stem in ("merged_model", "validation_results"):
                assert _contents(tmp_path / "out" / stem) == _contents(whole / "unpacked" / stem), what
            shutil.rmtree(tmp_path / "out")
        shutil.rmtree(folder)
