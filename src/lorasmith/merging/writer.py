"""The merged file: pieces put one after the other, hashed and written behind in threads."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lorasmith.errors import os_errors
from lorasmith.merging.disk import BLOCK, DEPTH, Lanes, open_file
from lorasmith.merging.running import Running


class Writer:
    """A new file of a known size, filled from its first byte to its last, hashed on the way and synced.

    A full buffer goes to the disk when the one after it is full as well: until then, threads may be at work
    on pieces of it.
    """

    def __init__(self, path: Path, size: int, lanes: Lanes, running: Running) -> None:
        self.path = path
        self.size = size
        self._lanes = lanes
        self._running = running
        self._digest = hashlib.sha256()
        with os_errors(path, "write"):
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
        self._full = (self._slot, self._used, self._running.begun)
        self._used = 0
        self._slot = (self._slot + 1) % DEPTH
        for job in self._busy[self._slot] or ():
            job.result()

    def _flush(self) -> None:
        """Hash and write the buffer that is full, once the pieces in it are made."""
        if self._full is None:
            return
        slot, used, begun = self._full
        self._running.finish(begun)
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

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
