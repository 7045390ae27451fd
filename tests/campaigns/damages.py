"""Damage a package, an unpacked package and a run folder at random; each damage has to be found.

`python -m tests.campaigns.damages --times 100` prints a table; exit code 1 if any damage was missed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lorasmith.errors import LorasmithError
from lorasmith.files.digests import seal_run
from lorasmith.packaging.pack import pack
from lorasmith.packaging.unpack import unpack
from lorasmith.packaging.verify import verify
from tests.samples import sample_run

SEED = 20261122
FOLDERS = {"package": "package in parts", "unpacked": "unpacked package", "run": "run folder"}


def files(folder: Path) -> list[Path]:
    """All files of a folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    """Path → bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files(folder)}


def flip_a_bit(folder: Path, chance: random.Random) -> str:
    """Turn one bit of one file."""
    path = chance.choice([path for path in files(folder) if path.stat().st_size])
    data = bytearray(path.read_bytes())
    place, bit = chance.randrange(len(data)), chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} of {path.name}"


def cut(folder: Path, chance: random.Random) -> str:
    """Cut the end off a file."""
    path = chance.choice([path for path in files(folder) if path.stat().st_size])
    keep = chance.randrange(path.stat().st_size)
    os.truncate(path, keep)
    return f"{path.name} cut to {keep}"


def append(folder: Path, chance: random.Random) -> str:
    """Add bytes to a file."""
    path = chance.choice(files(folder))
    with path.open("ab") as handle:
        handle.write(chance.choice([b"\0", b"\n", b" ", bytes(512), b"}"]))
    return f"{path.name} grew"


def remove(folder: Path, chance: random.Random) -> str:
    """Remove a file."""
    path = chance.choice(files(folder))
    path.unlink()
    return f"{path.name} removed"


def add(folder: Path, chance: random.Random) -> str:
    """Add a file."""
    place = chance.choice(files(folder)).parent
    path = place / chance.choice(["extra.bin", ".hidden", "model-00002.safetensors", "SHA256SUMS.bak"])
    path.write_bytes(b"not of this package")
    return f"{path.name} added"


def swap(folder: Path, chance: random.Random) -> str:
    """Exchange the contents of two files that differ."""
    while True:
        one, two = chance.sample(files(folder), 2)
        left, right = one.read_bytes(), two.read_bytes()
        if left != right:
            one.write_bytes(right)
            two.write_bytes(left)
            return f"{one.name} and {two.name} swapped"


def rename(folder: Path, chance: random.Random) -> str:
    """Give a file another name."""
    path = chance.choice(files(folder))
    path.rename(path.with_name(path.name + "x"))
    return f"{path.name} renamed"


def link(folder: Path, chance: random.Random) -> str:
    """Put a link to the same content in a file's place."""
    path = chance.choice([path for path in files(folder) if path.name not in ("SHA256SUMS", "manifest.json")])
    target = folder.parent / f"{folder.name}-target"
    path.rename(target)
    path.symlink_to(target)
    return f"{path.name} is a link"


def fill(folder: Path, chance: random.Random) -> str:
    """Overwrite a block with zeros, as a failing disk does."""
    path = chance.choice([path for path in files(folder) if any(path.read_bytes())])
    data = bytearray(path.read_bytes())
    while True:
        start = chance.randrange(len(data))
        if any(data[start : start + 512]):
            data[start : start + 512] = bytes(len(data[start : start + 512]))
            path.write_bytes(data)
            return f"{path.name} zeroed from {start}"


Damage = Callable[[Path, random.Random], str]

KINDS: dict[str, Damage] = {
    "one bit is turned": flip_a_bit,
    "a file is cut short": cut,
    "a file grew": append,
    "a file is missing": remove,
    "a file was added": add,
    "two files changed places": swap,
    "a file has another name": rename,
    "a link stands for a file": link,
    "a block is zero": fill,
}


def prepare(folder: Path) -> Path:
    """A sealed run with its package in parts, and the package unpacked beside it."""
    run = sample_run(folder / "run", count=10)
    pack(run, run / "package", part_size=9_000)
    seal_run(run)
    shutil.copytree(run / "package", folder / "package")
    unpack([folder / "package"], folder / "unpacked")
    return folder


@dataclass
class Tried:
    """One kind of damage to one kind of folder."""

    times: int = 0
    missed: list[str] = field(default_factory=list)

    @property
    def found(self) -> str:
        """`98 of 100`."""
        return f"{self.times - len(self.missed)} of {self.times}"


def check(whole: Path, damage: Damage, times: int, chance: random.Random) -> Tried:
    """Damage copies of a folder one by one, and let `verify` look at each."""
    tried = Tried(times)
    copy = whole.parent / f"damaged-{whole.name}"
    for _ in range(times):
        shutil.copytree(whole, copy)
        what = damage(copy, chance)
        if not any(finding.severity == "error" for finding in verify(copy)):
            tried.missed.append(what)
        shutil.rmtree(copy)
        (copy.parent / f"{copy.name}-target").unlink(missing_ok=True)
    return tried


def check_unpacking(whole: Path, damage: Damage, times: int, chance: random.Random) -> Tried:
    """Unpack damaged packages: either nothing comes out, or exactly what was packed does.

    What lies beside the archives, such as the bill of materials, may be lost or added.
    """
    tried = Tried(times)
    copy, out = whole / "damaged-download", whole / "out"
    for _ in range(times):
        shutil.copytree(whole / "package", copy)
        what = damage(copy, chance)
        try:
            unpack([copy], out)
        except LorasmithError:
            right = not out.exists() and not (whole / ".out.partial").exists()
        else:
            right = verify(out) == [] and all(
                contents(out / stem) == contents(whole / "unpacked" / stem)
                for stem in ("merged_model", "validation_results")
            )
        if not right:
            tried.missed.append(what)
        shutil.rmtree(copy)
        shutil.rmtree(out, ignore_errors=True)
        (whole / f"{copy.name}-target").unlink(missing_ok=True)
    return tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100)
    times = parser.parse_args().times
    chance = random.Random(SEED)
    missed: list[str] = []
    print(f"| damage | {' | '.join(FOLDERS.values())} | nothing wrong is unpacked |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        whole = prepare(Path(place))
        for name, damage in KINDS.items():
            tried = [check(whole / folder, damage, times, chance) for folder in FOLDERS]
            tried.append(check_unpacking(whole, damage, times, chance))
            print(f"| {name} | {' | '.join(one.found for one in tried)} |")
            missed += [f"{name}: {what}" for one in tried for what in one.missed]
    for line in missed:
        print(f"- missed: {line}")
    total = len(KINDS) * times * (len(FOLDERS) + 1)
    print(f"\n{total - len(missed)} of {total} damages were found.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
