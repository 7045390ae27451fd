"""The bytes of a file under proof: what is hashed is what is checked, read once and past the page cache.

Parts are asked for by several threads, mostly in the order of the file. Each part that was read is hashed as
soon as all before it are; only gaps that nobody asked for are read for the hash alone.
"""

from __future__ import annotations

import hashlib
import os
import threading
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from lorasmith.errors import InputError, os_errors
from lorasmith.files.digests import identity

_PAGE = 4096
"""Offsets, lengths and addresses of direct reads are multiples of it."""
_DIRECT_BYTES = 1 << 20
"""From here on a part is read past the page cache; smaller ones are cheaper through it."""
_GAP_BYTES = 8 << 20
"""Read at a time where only the hash needs it."""
_HELD_BYTES = 64 << 20
"""Parts that may wait for what stands before them in the file."""


class ProvenFile:
    """One file, as it was when it was first read. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with os_errors(path, "read"):
            self._file = path.open("rb", buffering=0)
            self._opened = identity(os.fstat(self._file.fileno()))
        self.size: int = os.fstat(self._file.fileno()).st_size
        """In bytes."""
        self._direct_failed = False
        self._hash: Any = hashlib.sha256()
        self._hashed = 0
        self._waiting: dict[int, memoryview] = {}
        self._hashing = False
        self._state = threading.Condition()

    def read(self, start: int, count: int) -> torch.Tensor:
        """[count] uint8 from byte `start` on; raises `InputError` where the file ends before."""
        with os_errors(self.path, "read"):
            part = self._read(start, count)
        self._offer(start, part.numpy().data)
        return part

    def digest(self) -> str:
        """SHA-256 of the whole file; reads what has not been read. For use when all parts have been taken.

        Raises `InputError` if the file was changed since it was opened.
        """
        with os_errors(self.path, "read"):
            while self._hashed < self.size:
                self._advance(reading=True)
            with self.path.open("rb") as now:
                unchanged = identity(os.fstat(now.fileno())) == self._opened
        if not unchanged:
            raise InputError(
                "the file changed while it was read",
                where=self.path,
                remedy="wait until nothing writes to it",
            )
        return str(self._hash.hexdigest())

    @property
    def data_start(self) -> int:
        """First byte behind the header of a safetensors file."""
        with os_errors(self.path, "read"):
            length = self._read(0, 8)
        return 8 + int.from_bytes(length.numpy().tobytes(), "little")

    @cached_property
    def _direct(self) -> FileIO | None:
        """The same file without the page cache; None where the file system has no such thing."""
        if not hasattr(os, "O_DIRECT"):
            return None
        try:
            file = open(self.path, "rb", buffering=0, opener=_open_direct)  # noqa: SIM115 (closed with self)
        except OSError:
            return None
        return file if identity(os.fstat(file.fileno())) == self._opened else None

    def _read(self, start: int, count: int) -> torch.Tensor:
        if count >= _DIRECT_BYTES and not self._direct_failed and (file := self._direct) is not None:
            first = start // _PAGE * _PAGE
            length = -(-(start + count - first) // _PAGE) * _PAGE
            memory = torch.empty(length + _PAGE, dtype=torch.uint8)
            shift = -memory.data_ptr() % _PAGE
            pages = memory[shift : shift + length]
            try:
                self._fill(file, pages, first, start + count - first)
            except OSError:
                self._direct_failed = True
            else:
                return pages[start - first : start - first + count]
        part = torch.empty(count, dtype=torch.uint8)
        self._fill(self._file, part, start, count)
        return part

    def _fill(self, file: FileIO, part: torch.Tensor, start: int, needed: int) -> None:
        view, done = part.numpy().data, 0
        while done < needed:
            # A direct read may stop short only at the end of the file, so that `done` stays a multiple.
            got = os.preadv(file.fileno(), [view[done:]], start + done)
            if not got:
                raise InputError(
                    f"the file ends at byte {start + done:,}",
                    where=self.path,
                    expected=f"{self.size:,} bytes",
                )
            done += got

    def _offer(self, start: int, part: memoryview) -> None:
        """Hash a part if it is the next one, and what waited for it; else let it wait, unless too many do."""
        with self._state:
            if start + len(part) <= self._hashed or not len(part):
                return
            if len(part) > len(self._waiting.get(start, b"")):
                self._waiting[start] = part
            while self._hashing and self._held > _HELD_BYTES:
                self._state.wait()  # what is read must not pile up before the hash
            if self._hashing:
                return
            self._hashing = True
        try:
            while self._advance(reading=False):
                pass
        finally:
            with self._state:
                self._hashing = False
                self._state.notify_all()

    @property
    def _held(self) -> int:
        return sum(len(part) for part in self._waiting.values())

    def _advance(self, *, reading: bool) -> bool:
        """Hash the next part if it is there, or read it where parts behind it have piled up."""
        with self._state:
            part = self._next()
            if part is None:
                if not reading and self._held <= _HELD_BYTES:
                    return False
                end = min(self._waiting, default=self.size)
        if part is None:
            count = min(end - self._hashed, _GAP_BYTES)
            part = self._read(self._hashed, count).numpy().data
        self._hash.update(part)  # without the lock: hashing lets other threads go on
        with self._state:
            self._hashed += len(part)
            self._state.notify_all()
        return True

    def _next(self) -> memoryview | None:
        """What stands at the hash's place, taken out; parts that lie behind it are let go."""
        found = self._waiting.pop(self._hashed, None)
        if found is not None:
            return found
        for start in [start for start in self._waiting if start < self._hashed]:
            part = self._waiting.pop(start)
            if start + len(part) > self._hashed:
                return part[self._hashed - start :]
        return None


def _open_direct(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_DIRECT)
