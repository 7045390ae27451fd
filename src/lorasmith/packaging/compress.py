"""Compressors for the archives: the bytes depend on the content and the compressor's version alone."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Protocol, cast

import zstandard
from isal import igzip_threaded, isal_zlib

from lorasmith.errors import UsageError
from lorasmith.packaging.archive import BLOCK, Read, Write

_GZIP_LEVEL = 1
"""On bf16 weights level 2 saves 0.2 % and level 3 costs 1 %: see benches/package.py."""
_ZSTD_LEVEL = 1
"""On bf16 weights level 3 saves 2 % and takes three times as long: see benches/package.py."""

_IsalError = cast(type[Exception], isal_zlib.error)
BROKEN: tuple[type[Exception], ...] = (EOFError, OSError, _IsalError, zstandard.ZstdError)
"""What a reader raises for bytes that are no archive of its kind."""


class ByteSink(Protocol):
    """Where compressed bytes go."""

    def write(self, data: bytes, /) -> int:
        """Take all of them."""

    def flush(self) -> None:
        """Hand on what is buffered."""


@dataclass(frozen=True)
class Compression:
    """One way to compress an archive."""

    name: str
    suffix: str
    """Ending of the archive's name, after its stem."""
    writer: Callable[[ByteSink], AbstractContextManager[Write]]
    """Opens a writer of uncompressed bytes on top of a file; the file stays open."""
    reader: Callable[[BinaryIO], AbstractContextManager[Read]]
    """Opens a reader of uncompressed bytes: as many as asked for, fewer only at the end."""


class _Blocks:
    """Passes bytes on in pieces of exactly `BLOCK`, whatever the sizes they come in.

    A compressor that works in parallel cuts where it is given a piece: equal pieces make equal archives.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._held = bytearray()

    def write(self, data: bytes) -> None:
        """Hold the bytes until a block is full."""
        self._held += data
        while len(self._held) >= BLOCK:
            self._write(bytes(self._held[:BLOCK]))
            del self._held[:BLOCK]

    def finish(self) -> None:
        """Pass the last, shorter block on."""
        if self._held:
            self._write(bytes(self._held))
            self._held.clear()


def _threads() -> int:
    """Two at least: a compressor may cut otherwise when it works alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(2, cores or 2)


@contextmanager
def _write_gzip(target: ByteSink) -> Iterator[Write]:
    # Each block is deflated alone with the 32 KiB before it as its dictionary, so the number of threads does
    # not show in the bytes (a test holds this); the header carries no name and no time.
    with igzip_threaded.open(
        target, "wb", compresslevel=_GZIP_LEVEL, threads=_threads(), block_size=BLOCK
    ) as packed:
        blocks = _Blocks(packed.write)
        yield blocks.write
        blocks.finish()


@contextmanager
def _read_gzip(source: BinaryIO) -> Iterator[Read]:
    with igzip_threaded.open(source, "rb", block_size=BLOCK) as unpacked:
        yield unpacked.read


@contextmanager
def _write_zstd(target: ByteSink) -> Iterator[Write]:
    # Jobs are cut by level, not by the number of threads (a test holds this).
    packer = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, threads=_threads(), write_checksum=True)
    with packer.stream_writer(cast(BinaryIO, target), closefd=False) as packed:
        blocks = _Blocks(packed.write)
        yield blocks.write
        blocks.finish()


@contextmanager
def _read_zstd(source: BinaryIO) -> Iterator[Read]:
    unpacker = zstandard.ZstdDecompressor()
    with unpacker.stream_reader(source, closefd=False, read_across_frames=True) as unpacked:
        yield io.BufferedReader(unpacked, BLOCK).read


@contextmanager
def _write_plain(target: ByteSink) -> Iterator[Write]:
    yield target.write


@contextmanager
def _read_plain(source: BinaryIO) -> Iterator[Read]:
    yield source.read


COMPRESSIONS = {
    entry.name: entry
    for entry in (
        Compression("gzip", ".tar.gz", _write_gzip, _read_gzip),
        Compression("zstd", ".tar.zst", _write_zstd, _read_zstd),
        Compression("none", ".tar", _write_plain, _read_plain),
    )
}


def find_compression(name: str) -> Compression:
    """The compression of this name; raises `UsageError` for an unknown name."""
    if name not in COMPRESSIONS:
        raise UsageError(
            f"there is no compression {name!r}", expected=f"one of {', '.join(sorted(COMPRESSIONS))}"
        )
    return COMPRESSIONS[name]
