"""Large files past the page cache: read ahead and write behind in threads, on page-aligned buffers.

A merge reads and writes each byte once, so the cache only costs memory and time. Direct I/O needs buffers,
offsets and lengths that are multiples of a block; where a file system has none, the same calls go through the
cache.
"""

from __future__ import annotations

import errno
import hashlib
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
DEPTH = 3
"""Buffers each way: one in use, one under way, one to spare."""
_BLOCK = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


def aligned(size: int) -> memoryview:
    """Zeroed memory that begins at a page."""
    return memoryview(mmap.mmap(-1, -(-size // _BLOCK) * _BLOCK))


class Lanes:
    """The threads and buffers of one merge, used for shard after shard."""

    def __init__(self) -> None:
        self.reading = ThreadPoolExecutor(1, "merge-read")
        self.hashing_in = ThreadPoolExecutor(1, "merge-hash-in")
        self.hashing_out = ThreadPoolExecutor(1, "merge-hash-out")
        self.writing = ThreadPoolExecutor(1, "merge-write")
        self.inputs = [aligned(BUFFER_BYTES) for _ in range(DEPTH)]
        self.outputs = [aligned(BUFFER_BYTES) for _ in range(DEPTH)]
        self.direct = True
        """Whether every file so far was read and written past the cache."""

    def close(self) -> None:
        """Wait for what is under way and end the threads."""
        for lane in (self.reading, self.hashing_in, self.hashing_out, self.writing):
            lane.shutdown(wait=True, cancel_futures=True)


def _open(path: Path, flags: int) -> tuple[int, bool]:
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
            self._handle, direct = _open(path, os.O_RDONLY)
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
            wanted = min(len(buffer), -(-count // _BLOCK) * _BLOCK) - done
            with os_errors(self.path, "read"):
                got = os.preadv(self._handle, [buffer[done : done + wanted]], offset + done)
            if got <= 0 or (done + got < count and got % _BLOCK):
                raise CheckpointError("the file ended while it was read", where=self.path)
            done += got
        return count

    def chunks(self) -> Iterator[memoryview]:
        """The file in pieces of the buffers' size; a piece is valid until the next is asked for."""
        while self._ahead:
            buffer, slot, job = self._ahead.popleft()
            chunk = buffer[: job.result()]
            if self._digest is not None:
                self._hashed[slot] = self._lanes.hashing_in.submit(self._digest.update, chunk)
            yield chunk
            self._schedule()

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


class Writer:
    """A new file of a known size, filled from its first byte to its last, hashed on the way and synced."""

    def __init__(self, path: Path, size: int, lanes: Lanes) -> None:
        self.path = path
        self.size = size
        self._lanes = lanes
        self._digest = hashlib.sha256()
        with os_errors(path, "write"):
            path.unlink(missing_ok=True)
            self._handle, direct = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            self._reserve()
        lanes.direct = lanes.direct and direct
        self._busy: list[tuple[Future[None], Future[None]] | None] = [None] * DEPTH
        self._slot = 0
        self._used = 0
        self._offset = 0

    def _reserve(self) -> None:
        try:
            if self.size:
                os.posix_fallocate(self._handle, 0, self.size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                os.close(self._handle)
                raise

    def space(self) -> memoryview:
        """The free rest of the current buffer, never empty."""
        if self._used == len(self._buffer):
            self._flush()
        return self._buffer[self._used :]

    @property
    def _buffer(self) -> memoryview:
        return self._lanes.outputs[self._slot]

    def filled(self, count: int) -> None:
        """Say that the first `count` bytes of `space()` are written."""
        self._used += count

    def append(self, content: bytes | bytearray | memoryview) -> None:
        """Copy bytes in, over as many buffers as they need."""
        rest = memoryview(content).cast("B")
        while len(rest):
            space = self.space()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            self.filled(count)
            rest = rest[count:]

    def _flush(self) -> None:
        chunk = self._buffer[: self._used]
        hashed = self._lanes.hashing_out.submit(self._digest.update, chunk)
        written = self._lanes.writing.submit(self._write, self._buffer, self._used, self._offset)
        self._busy[self._slot] = (hashed, written)
        self._offset += self._used
        self._used = 0
        self._slot = (self._slot + 1) % DEPTH
        busy = self._busy[self._slot]
        if busy is not None:
            for job in busy:
                job.result()

    def _write(self, buffer: memoryview, count: int, offset: int) -> None:
        # Whole blocks only; what the last one holds too much is cut off at the end.
        whole = -(-count // _BLOCK) * _BLOCK
        done = 0
        while done < whole:
            with os_errors(self.path, "write"):
                done += os.pwrite(self._handle, buffer[done:whole], offset + done)

    def finish(self) -> str:
        """Write what is left, cut the file to its size, sync it; SHA-256 of all of it."""
        if self._used:
            self._flush()
        for busy in self._busy:
            for job in busy or ():
                job.result()
        if self._offset != self.size:
            raise AssertionError(f"{self.path.name}: {self._offset} bytes written, {self.size} planned")
        with os_errors(self.path, "write"):
            os.ftruncate(self._handle, self.size)
            os.fsync(self._handle)
        return self._digest.hexdigest()

    def close(self) -> None:
        """Wait for writes under way and close the file."""
        for busy in self._busy:
            for job in busy or ():
                with suppress(BaseException):
                    job.result()
        os.close(self._handle)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
