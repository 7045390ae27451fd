"""Archives in one piece or in several: written and read as one stream, hashed as a whole and by piece."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from lorasmith.errors import UsageError, os_errors
from lorasmith.records.base import FileDigest

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SMALLEST = 1000
"""Bytes of a part: below this a large model would become millions of files."""


def parse_size(text: str) -> int:
    """`500M`, `2GB`, `1GiB` or a plain number of bytes; raises `UsageError` for anything else."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) * _UNITS[match[2]] < _SMALLEST:
        raise UsageError(
            f"{text!r} is no size of a part",
            expected=f"such as 500M, 2GB or 1GiB, at least {_SMALLEST} bytes",
        )
    return int(match[1]) * _UNITS[match[2]]


def part_name(archive: str, number: int) -> str:
    """`merged_model.tar.gz.part-0000`: `cat` in order of names joins them."""
    return f"{archive}.part-{number:04d}"


class ArchiveWriter:
    """A file, or parts of `part_size` bytes, that hashes all that is written."""

    def __init__(self, path: Path, part_size: int | None) -> None:
        self._path = path
        self._part_size = part_size
        self._part = hashlib.sha256()
        # One piece is the whole: its bytes are not hashed twice.
        self._whole = self._part if part_size is None else hashlib.sha256()
        self._handle: IO[bytes] | None = None
        self._in_part = 0
        self.bytes = 0
        self.parts: list[FileDigest] = []

    def write(self, data: bytes, /) -> int:
        """Take all bytes, opening new parts as they fill."""
        view = memoryview(data)
        if self._whole is not self._part:
            self._whole.update(view)
        self.bytes += len(view)
        done = 0
        while done < len(view):
            handle = self._handle or self._open()
            room = len(view) if self._part_size is None else self._part_size - self._in_part
            piece = view[done : done + room]
            handle.write(piece)
            self._part.update(piece)
            self._in_part += len(piece)
            done += len(piece)
            if self._in_part == self._part_size:
                self._close_part()
        return len(view)

    def flush(self) -> None:
        """Hand on what is buffered."""
        if self._handle is not None:
            self._handle.flush()

    def digest(self) -> FileDigest:
        """Of the archive as one file."""
        return FileDigest(path=self._path.name, bytes=self.bytes, sha256=self._whole.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._close_part()

    def _current(self) -> Path:
        if self._part_size is None:
            return self._path
        return self._path.with_name(part_name(self._path.name, len(self.parts)))

    def _open(self) -> IO[bytes]:
        with os_errors(self._current(), "write"):
            self._handle = self._current().open("wb")
        return self._handle

    def _close_part(self) -> None:
        assert self._handle is not None
        self._handle.close()
        self._handle = None
        self.parts.append(
            FileDigest(path=self._current().name, bytes=self._in_part, sha256=self._part.hexdigest())
        )
        if self._part_size is not None:
            self._part = hashlib.sha256()
        self._in_part = 0


class JoinedReader(io.RawIOBase):
    """Several files read one after another as if they were one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._left = list(files)
        self._handle: IO[bytes] | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Fill the buffer from the current file, going on to the next at its end."""
        while True:
            if self._handle is None:
                if not self._left:
                    return 0
                path = self._left.pop(0)
                with os_errors(path, "read"):
                    self._handle = path.open("rb")
            count = self._handle.readinto(buffer)  # type: ignore[attr-defined]
            if count:
                return int(count)
            self._handle.close()
            self._handle = None

    def close(self) -> None:
        """Close the file that is open."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None
        super().close()
