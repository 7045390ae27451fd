"""Packing side by side with `tar czf`: rate, ratio and memory, on given and on random bf16 weights.

    python benches/package.py --weights FOLDER [--random-mb 256] [--repeat 3]

Beside them the bare compressors, which write no tar and hash nothing: isal and zstd at several levels, alone
and on two threads. And what packs weights apart from a tar: bytes split by place and zstd, and ZipNN where it
is there. Each figure is the best of its repetitions, each way in a process of its own.

Weights that come from 4-bit values compress unusually well; the random ones are N(0, 0.02) as bf16, which is
what trained weights look like to a compressor.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from lorasmith.packaging.archive import Member
from lorasmith.packaging.compress import COMPRESSIONS
from lorasmith.packaging.pack import write_archive
from lorasmith.packaging.verify import Package, read_members
from lorasmith.records.base import FileDigest
from lorasmith.records.release import PackageManifest


@dataclass(frozen=True)
class Row:
    """One way of packing one folder."""

    name: str
    seconds: float
    size: int
    peak_bytes: int | None
    """None where it cannot be told apart from this interpreter's own."""
    unpack_seconds: float | None
    """None where nothing was unpacked."""


def best(rows: list[Row]) -> Row:
    """The shortest times of several tries of one way."""
    times = [row.unpack_seconds for row in rows if row.unpack_seconds is not None]
    return replace(
        rows[0], seconds=min(row.seconds for row in rows), unpack_seconds=min(times) if times else None
    )


def random_weights(folder: Path, megabytes: int) -> Path:
    """A file of bf16 numbers drawn from N(0, 0.02): the upper halves of float32 numbers."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as handle:
        for _ in range(megabytes):
            values = generator.normal(0, 0.02, size=500_000).astype(np.float32)
            handle.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return folder


def ours(folder: Path, method: str, place: Path) -> Row:
    """Pack as `lorasmith package` does (tar, three SHA-256, compression), then read back as `unpack` does."""
    members = [Member(f"model/{p.relative_to(folder)}", p) for p in sorted(folder.rglob("*")) if p.is_file()]
    archive = place / f"model{COMPRESSIONS[method].suffix}"
    began = time.perf_counter()
    written = write_archive(archive, members, COMPRESSIONS[method], None, lambda count: None)
    packed = time.perf_counter() - began
    manifest = PackageManifest(
        compression=method,
        archives=[written.whole],
        contents={archive.name: written.members},
        stream_sha256={archive.name: written.stream_sha256},
    )
    began = time.perf_counter()
    read_members(
        Package(place, manifest, {}, COMPRESSIONS[method]), archive.name, _discard, lambda count: None
    )
    unpacked = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Row(f"lorasmith {method}", packed, written.whole.bytes, peak, unpacked)


def _discard(member: FileDigest) -> Callable[[bytes], None]:
    return lambda data: None


def tar(folder: Path, place: Path) -> Row:
    """`tar czf`, then `tar xzf`; neither hashes anything."""
    archive = place / "model.tar.gz"
    began = time.perf_counter()
    subprocess.run(["tar", "czf", archive, "-C", folder.parent, folder.name], check=True)
    packed = time.perf_counter() - began
    began = time.perf_counter()
    subprocess.run(["tar", "xzOf", archive], check=True, stdout=subprocess.DEVNULL)
    unpacked = time.perf_counter() - began
    return Row("tar czf", packed, archive.stat().st_size, None, unpacked)


BARE: dict[str, dict[str, int]] = {
    "zstd 1, alone": {"level": 1, "threads": 0},
    "zstd 1": {"level": 1, "threads": 2},
    "zstd 3": {"level": 3, "threads": 2},
    "zstd 1, long": {"level": 1, "threads": 2, "long": 27},
    "isal 1, alone": {"gzip": 1, "threads": 1},
    "isal 1": {"gzip": 1, "threads": 2},
}
"""Compressors without tar and hashes; `threads` of 0 or 1 compress where they are called."""


class Counter:
    """A file that keeps only the number of bytes."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: bytes) -> int:
        """Count and forget."""
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held."""


def bare(folder: Path, name: str) -> Row:
    """One compressor over all files, in pieces of 1 MiB; nothing is written and nothing read back."""
    import zstandard
    from isal import igzip_threaded

    how, target = BARE[name], Counter()
    if "gzip" in how:
        packed = igzip_threaded.open(
            target, "wb", compresslevel=how["gzip"], threads=how["threads"], block_size=1 << 20
        )
    else:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            how["level"],
            threads=how["threads"],
            write_checksum=1,
            **({"enable_ldm": 1, "window_log": how["long"]} if "long" in how else {}),
        )
        packer = zstandard.ZstdCompressor(compression_params=parameters)
        packed = packer.stream_writer(target, closefd=False)
    began = time.perf_counter()
    with packed:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as handle:
                while block := handle.read(1 << 20):
                    packed.write(block)
    return Row(name, time.perf_counter() - began, target.size, None, None)


_BLOCK = 32 << 20


def byte_split(folder: Path, place: Path) -> Row:
    """The two bytes of each bf16 number apart, each half by zstd level 1 on all cores; nothing is hashed."""
    import zstandard

    packer = zstandard.ZstdCompressor(level=1, threads=-1)
    unpacker = zstandard.ZstdDecompressor()

    def pack(block: bytes) -> list[bytes]:
        pairs = np.frombuffer(block, dtype=np.uint8).reshape(-1, 2)
        return [packer.compress(np.ascontiguousarray(pairs[:, half]).tobytes()) for half in (0, 1)]

    def unpack(parts: list[bytes]) -> bytes:
        halves = [np.frombuffer(unpacker.decompress(part), dtype=np.uint8) for part in parts]
        return np.stack(halves, axis=1).tobytes()

    return _blocks("byte split, zstd", folder, pack, unpack)


def zipnn(folder: Path, place: Path) -> Row | None:
    """ZipNN, which changes the buffer it is given: it gets a copy. None where it is not installed."""
    try:
        from zipnn import ZipNN
    except ImportError:
        return None
    codec = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=2)

    def pack(block: bytes) -> list[bytes]:
        return [bytes(codec.compress(bytearray(block)))]

    return _blocks("ZipNN", folder, pack, lambda parts: bytes(codec.decompress(parts[0])))


def _blocks(
    name: str, folder: Path, pack: Callable[[bytes], list[bytes]], unpack: Callable[[list[bytes]], bytes]
) -> Row:
    """Weights of a folder block by block through a codec; every block has to come back as it was."""
    packed = unpacked = 0.0
    size = 0
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as handle:
            while block := handle.read(_BLOCK):
                if len(block) % 2:
                    block += b"\0"
                began = time.perf_counter()
                parts = pack(block)
                middle = time.perf_counter()
                again = unpack(parts)
                unpacked += time.perf_counter() - middle
                packed += middle - began
                size += sum(map(len, parts))
                if again != block:
                    sys.exit(f"{name} is not lossless on {path}")
    return Row(name, packed, size, None, unpacked)


def measure(folder: Path, repeat: int) -> None:
    """Each try in a process of its own, so that peak memory is its own; prints a table."""
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        calls: list[tuple[Any, ...]] = [(tar, folder, Path(place))]
        calls += [(ours, folder, method, Path(place)) for method in COMPRESSIONS]
        calls += [(bare, folder, name) for name in BARE]
        calls += [(byte_split, folder, Path(place)), (zipnn, folder, Path(place))]
        for function, *arguments in calls:
            tries = []
            for _ in range(1 if function is tar else repeat):  # tar takes long enough to be sure
                with get_context("spawn").Pool(1) as pool:
                    tries.append(pool.apply(function, arguments))
            if tries[0] is None:
                print("ZipNN is not installed: pip install zipnn", file=sys.stderr)
            else:
                rows.append(best(tries))
    print(f"\n{folder}: {total / 1e6:.0f} MB")
    print(f"{'':<16} {'pack MB/s':>10} {'× tar':>6} {'ratio':>7} {'unpack MB/s':>12} {'peak MB':>8}")
    for row in rows:
        peak = "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        back = "–" if row.unpack_seconds is None else f"{total / row.unpack_seconds / 1e6:.0f}"
        print(
            f"{row.name:<16} {total / row.seconds / 1e6:>10.0f} {rows[0].seconds / row.seconds:>6.1f} "
            f"{row.size / total:>7.4f} {back:>12} {peak:>8}"
        )


def main() -> None:
    """Parse the arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="a folder with real weights")
    parser.add_argument("--random-mb", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="lorasmith-bench-"))
    try:
        if options.weights:
            copy = place / options.weights.resolve().name
            shutil.copytree(options.weights, copy)
            measure(copy, options.repeat)
        measure(random_weights(place / "random-bf16", options.random_mb), options.repeat)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main())
