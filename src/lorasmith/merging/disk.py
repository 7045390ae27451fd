"""Large files past the page cache: threads, page-aligned buffers, a reader and a writer that use them.

A merge reads and writes each byte once, so the cache only costs memory and time. Direct I/O needs buffers,
offsets and lengths that are multiples of a block; where a file system has none, the same calls go through the
cache.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
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
        """True as long as every file was read and written past the cache."""

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


class FileReader:
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
        # The buffer's last content may still be on its way into the digest.
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
            # Two chunks may be in use at a time: the first one's buffer is filled again with the third.
            if number > 1:
                self._schedule()
            if not self._ahead:
                return
            buffer, slot, job = self._ahead.popleft()
            chunk = buffer[: job.result()]
            if self._digest is not None:
                self._hashed[slot] = self._lanes.hashing_in.submit(self._digest.update, chunk)
            yield chunk

    def finish(self) -> str:
        """SHA-256 of the whole file, which must have been asked for."""
        assert self._digest is not None
        for job in self._hashed:
            if job is not None:
                job.result()
        return self._digest.hexdigest()

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

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


Finish = Callable[[], None]
"""Waits for a piece that was begun and completes it; raises what went wrong with it."""


def nothing_left() -> None:
    """The end of a piece that was made at once."""


class PendingPieces:
    """What was begun and not completed yet, in order; the memory that it uses is not to be touched."""

    def __init__(self) -> None:
        self._jobs: deque[Finish] = deque()
        self.begun = 0
        """The number of pieces that were begun so far."""

    def add(self, finish: Finish) -> None:
        """Take note of a piece that was begun."""
        self._jobs.append(finish)
        self.begun += 1

    def finish(self, count: int) -> None:
        """Complete the first `count` of all pieces, as far as they are not."""
        while self.begun - len(self._jobs) < count:
            self._jobs.popleft()()

    def __enter__(self) -> PendingPieces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._jobs:
            # After an error: only wait, so that no thread writes into buffers that others use by now.
            with suppress(Exception):
                self._jobs.popleft()()


class FileWriter:
    """A new file of a known size, filled from its first byte to its last, hashed on the way and synced.

    A full buffer goes to the disk when the one after it is full as well: until then, threads may be at work
    on pieces of it.
    """

    def __init__(self, path: Path, size: int, lanes: Lanes, pending: PendingPieces) -> None:
        self.path = path
        self.size = size
        self._lanes = lanes
        self._pending = pending
        self._digest = hashlib.sha256()
        with os_errors(path, "write"):
            # A new inode: whoever still reads or writes an older file of this name keeps that one.
            path.unlink(missing_ok=True)
            self._handle, direct = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            self._reserve()
        lanes.direct = lanes.direct and direct
        self._busy: list[tuple[Future[None], Future[None]] | None] = [None] * DEPTH
        self._full: tuple[int, int, int] | None = None
        """The buffer that is full and not on its way: slot, bytes, and the pieces begun by then."""
        self._slot = 0
        self._used = 0
        self._offset = 0

    def _reserve(self) -> None:
        try:
            # A full disk is an error now, not after an hour, and the file lies in one piece.
            if self.size:
                os.posix_fallocate(self._handle, 0, self.size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                os.close(self._handle)
                raise

    def space(self) -> memoryview:
        """The free rest of the current buffer, never empty."""
        if self._used == len(self._buffer):
            self._turn()
        return self._buffer[self._used :]

    @property
    def _buffer(self) -> memoryview:
        return self._lanes.outputs[self._slot]

    def filled(self, count: int) -> None:
        """Say that the first `count` bytes of `space()` are written, or will be by a piece under way."""
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

    def _turn(self) -> None:
        """Go on to the next buffer, as soon as that is free."""
        self._flush()
        self._full = (self._slot, self._used, self._pending.begun)
        self._used = 0
        self._slot = (self._slot + 1) % DEPTH
        for job in self._busy[self._slot] or ():
            job.result()

    def _flush(self) -> None:
        """Hash and write the buffer that is full, once the pieces in it are made."""
        if self._full is None:
            return
        slot, used, begun = self._full
        self._pending.finish(begun)
        buffer = self._lanes.outputs[slot]
        hashed = self._lanes.hashing_out.submit(self._digest.update, buffer[:used])
        written = self._lanes.writing.submit(self._write, buffer, used, self._offset)
        self._busy[slot] = (hashed, written)
        self._offset += used
        self._full = None

    def _write(self, buffer: memoryview, count: int, offset: int) -> None:
        # Whole blocks only; what the last one holds too much is cut off at the end.
        whole = -(-count // BLOCK) * BLOCK
        done = 0
        while done < whole:
            with os_errors(self.path, "write"):
                done += os.pwrite(self._handle, buffer[done:whole], offset + done)

    def finish(self) -> str:
        """Write what is left, cut the file to its size, sync it; SHA-256 of all of it."""
        self._turn()
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

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
