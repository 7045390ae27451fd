"""Large files past the page cache: threads and page-aligned buffers, and the reader that uses them.

A merge reads and writes each byte once, so the cache only costs memory and time. Direct I/O needs buffers,
offsets and lengths that are multiples of a block; where a file system has none, the same calls go through the
cache.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lorasmith.errors import CheckpointError, os_errors

BUFFER_BYTES = 32 << 20
DEPTH = 5
"""Buffers each way: two that pieces are made from or in, two on their way, one to spare."""
BLOCK = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


def aligned(size: int) -> memoryview:
    """Zeroed memory that begins at a page."""
    return memoryview(mmap.mmap(-1, -(-size // BLOCK) * BLOCK))


class Lanes:
    """The threads and buffers of one merge, used for shard after shard.

    Two threads each way: the disk has a request in hand while the thread of the last one waits for Python's
    lock, which the arithmetic takes often.
    """

    def __init__(self) -> None:
        self.reading = ThreadPoolExecutor(2, "merge-read")
        self.hashing_in = ThreadPoolExecutor(1, "merge-hash-in")
        self.hashing_out = ThreadPoolExecutor(1, "merge-hash-out")
        self.writing = ThreadPoolExecutor(2, "merge-write")
        self.inputs = [aligned(BUFFER_BYTES) for _ in range(DEPTH)]
        self.outputs = [aligned(BUFFER_BYTES) for _ in range(DEPTH)]
        self.direct = True
        """Whether every file so far was read and written past the cache."""

    def close(self) -> None:
        """Wait for what is under way and end the threads."""
        for lane in (self.reading, self.hashing_in, self.hashing_out, self.writing):
            lane.shutdown(wait=True, cancel_futures=True)


def open_file(path: Path, flags: int) -> tuple[int, bool]:
    """A descriptor, past the cache where the file system can."""
    if _DIRECT:
        with suppress(OSError):
            return os.open(path, flags | _DIRECT | os.O_CLOEXEC, 0o666), True
    return os.open(path, flags | os.O_CLOEXEC, 0o666), False


class Reader:
    """A file from its first byte to its last, hashed on the way."""

    def __init__(self, path: Path, size: int, lanes: Lanes, *, digest: bool) -> None:
        self.path = path
        self.size = size
        self._lanes = lanes
        self._digest = hashlib.sha256() if digest else None
        with os_errors(path, "read"):
            self._handle, direct = open_file(path, os.O_RDONLY)
        lanes.direct = lanes.direct and direct
        self._ahead: deque[tuple[memoryview, int, Future[int]]] = deque()
        self._scheduled = 0
        self._hashed: list[Future[None] | None] = [None] * DEPTH
        self._number = 0
        for _ in range(DEPTH):
            self._schedule()

    def _schedule(self) -> None:
        if self._scheduled >= self.size:
            return
        slot = self._number % DEPTH
        buffer = self._lanes.inputs[slot]
        count = min(len(buffer), self.size - self._scheduled)
        job = self._lanes.reading.submit(self._fill, buffer, self._scheduled, count, self._hashed[slot])
        self._ahead.append((buffer, slot, job))
        self._scheduled += count
        self._number += 1

    def _fill(self, buffer: memoryview, offset: int, count: int, free: Future[None] | None) -> int:
        if free is not None:
            free.result()
        done = 0
        while done < count:
            # Up to the next block: a direct read must ask for whole ones, and ends where the file does.
            wanted = min(len(buffer), -(-count // BLOCK) * BLOCK) - done
            with os_errors(self.path, "read"):
                got = os.preadv(self._handle, [buffer[done : done + wanted]], offset + done)
            if got <= 0 or (done + got < count and got % BLOCK):
                raise CheckpointError("the file ended while it was read", where=self.path)
            done += got
        return count

    def chunks(self) -> Iterator[memoryview]:
        """The file in pieces of the buffers' size; one is valid until the next but one is asked for."""
        for number in itertools.count():
            if number > 1:
                self._schedule()
            if not self._ahead:
                return
            buffer, slot, job = self._ahead.popleft()
            chunk = buffer[: job.result()]
            if self._digest is not None:
                self._hashed[slot] = self._lanes.hashing_in.submit(self._digest.update, chunk)
            yield chunk

    def finish(self) -> str | None:
        """SHA-256 of the whole file, if it was asked for."""
        for job in self._hashed:
            if job is not None:
                job.result()
        return self._digest.hexdigest() if self._digest is not None else None

    def close(self) -> None:
        """Wait for reads under way and close the file."""
        for *_, job in self._ahead:
            if not job.cancel():
                with suppress(BaseException):
                    job.result()
        for hashed in self._hashed:
            if hashed is not None:
                with suppress(BaseException):
                    hashed.result()
        os.close(self._handle)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
