"""Compressors for the archives: the bytes depend on the content and the compressor's version alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from isal import igzip_threaded

from lorasmith.errors import UsageError
from lorasmith.packaging.tarstream import BLOCK, Write

_GZIP_LEVEL = 1
"""On bf16 weights level 2 saves 0.2 % and level 3 costs 1 %: see benches/package.py."""


class Target(Protocol):
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
    """Of the archive, after its stem."""
    open: Callable[[Target], AbstractContextManager[Write]]
    """Opens a writer of uncompressed bytes on top of a file; the file stays open."""


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


@contextmanager
def _gzip(target: Target) -> Iterator[Write]:
    # Each block is deflated alone with the 32 KiB before it as its dictionary, so the number of threads does
    # not show in the bytes (a test holds this); the header carries no name and no time.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(2, cores or 2)
    with igzip_threaded.open(
        target, "wb", compresslevel=_GZIP_LEVEL, threads=threads, block_size=BLOCK
    ) as packed:
        blocks = _Blocks(packed.write)
        yield blocks.write
        blocks.finish()


@contextmanager
def _none(target: Target) -> Iterator[Write]:
    yield target.write


COMPRESSIONS = {
    entry.name: entry
    for entry in (
        Compression("gzip", ".tar.gz", _gzip),
        Compression("none", ".tar", _none),
    )
}


def compression(name: str) -> Compression:
    """Look one up; raises `UsageError` for an unknown name."""
    if name not in COMPRESSIONS:
        raise UsageError(
            f"there is no compression {name!r}", expected=f"one of {', '.join(sorted(COMPRESSIONS))}"
        )
    return COMPRESSIONS[name]
