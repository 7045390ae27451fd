"""Results of finished chunks on disk, so that a killed run goes on after the last of them.

One file: a line of JSON that says whose results these are, then for each chunk a line of JSON with its
rows, its length, its checksum and what computed it, the packed result, and a line end. A damaged or
unfinished end is cut off.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import lock_descriptor

from lorasmith.errors import BusyError, os_errors

# Lines of JSON with a checksum of themselves and of the bytes that follow them; a file under one process.


def sealed_line(body: Mapping[str, Any], packed: bytes = b"") -> bytes:
    """A line of JSON with the checksum of itself and of what follows it."""
    text = json.dumps(body)
    return json.dumps({**body, "crc": zlib.crc32(text.encode() + packed)}).encode() + b"\n"


def sound(line: bytes, packed: bytes = b"") -> dict[str, Any] | None:
    """The line's content when the checksum is right, else None."""
    body = _parse(line)
    if body is None or body.pop("crc", None) != zlib.crc32(json.dumps(body).encode() + packed):
        return None
    return body


def read_sealed(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next line and the bytes that its `bytes` tells of, to their line end; None where that is torn."""
    line = file.readline()
    body = _parse(line)
    if body is None or not isinstance(body.get("bytes"), int):
        return None
    packed = file.read(body["bytes"])
    content = sound(line, packed)
    return None if content is None or file.read(1) != b"\n" else (content, packed)


def lock_file(file: BinaryIO, *, found: str, where: Path, remedy: str) -> None:
    """Take an open file's lock, which the kernel frees with the process; `BusyError` where it is held."""
    if not lock_descriptor(file.fileno(), blocking=False):
        raise BusyError(found, where=where, remedy=remedy)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(line)
    except ValueError:
        return None
    return body if line.endswith(b"\n") and isinstance(body, dict) else None


Rows = tuple[int, ...]

_FORMAT = "lorasmith/journal/1"


class Journal:
    """An open journal; one process at a time. Use as a context manager."""

    def __init__(self, path: Path, key: str, notes: Mapping[str, Any]) -> None:
        """`key` names inputs and settings: results under another key are dropped. `notes` are kept with it.

        Raises `BusyError` when another process has the journal open.
        """
        self.path = path
        self.limit: int | None = None
        """Smallest size that did not fit in memory so far."""
        self._found: dict[Rows, tuple[int, int]] = {}
        self._made_by: dict[Rows, Mapping[str, Any]] = {}
        self._rows: set[int] = set()
        with os_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle: BinaryIO = path.open("a+b")
            self._lock()
            kept = self._read(key)
            self.notes: dict[str, Any] = kept if kept is not None else self._begin(key, notes)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def __contains__(self, rows: Rows) -> bool:
        return rows in self._found

    def touches(self, rows: Rows) -> bool:
        """Whether some of these rows are done."""
        return not self._rows.isdisjoint(rows)

    def entries(self) -> Iterator[tuple[Rows, bytes]]:
        """Every chunk with its packed result, in the order of their making."""
        for rows in self.chunks():
            yield rows, self.read(rows)

    def chunks(self) -> list[Rows]:
        """The rows of every chunk, in the order of their making."""
        return list(self._found)

    def read(self, rows: Rows) -> bytes:
        """The packed result of one chunk; KeyError when it is not there."""
        start, size = self._found[rows]
        return os.pread(self._handle.fileno(), size, start)

    def made_by(self, rows: Rows) -> Mapping[str, Any] | None:
        """What computed a chunk, as `add` was told."""
        return self._made_by.get(rows)

    def add(
        self, rows: Rows, packed: bytes, limit: int | None, made_by: Mapping[str, Any] | None = None
    ) -> None:
        """Write a result, and what computed it, and sync it to disk."""
        body = {"rows": rows, "bytes": len(packed), "limit": limit, "made_by": made_by}
        with os_errors(self.path, "write"):
            start = self._handle.seek(0, os.SEEK_END)
            line = sealed_line(body, packed)
            self._handle.write(line + packed + b"\n")
            self._sync()
        self._remember(rows, start + len(line), len(packed), made_by)

    def remove(self) -> None:
        """Delete it: what it held is in the results now."""
        with os_errors(self.path, "remove"):
            self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            lock_file(
                self._handle,
                found="another process works on the same output",
                where=self.path.parent,
                remedy="wait until it ends, or choose another output",
            )
        except BusyError:
            self._handle.close()
            raise

    def _sync(self) -> None:
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def _remember(self, rows: Rows, start: int, size: int, made_by: Mapping[str, Any] | None) -> None:
        self._found[rows] = (start, size)
        if made_by is not None:
            self._made_by[rows] = made_by
        self._rows.update(rows)

    def _begin(self, key: str, notes: Mapping[str, Any]) -> dict[str, Any]:
        self._handle.truncate(0)
        self._handle.write(sealed_line({"format": _FORMAT, "key": key, "notes": dict(notes)}))
        self._sync()
        return dict(notes)

    def _read(self, key: str) -> dict[str, Any] | None:
        """The notes under this key, sound entries remembered and the rest cut off; None for another key."""
        self._handle.seek(0)
        head = sound(self._handle.readline())
        if head is None or head.get("format") != _FORMAT or head.get("key") != key:
            return None
        end = self._handle.tell()
        while entry := self._read_entry():
            rows, start, body = entry
            self.limit = body["limit"]
            self._remember(rows, start, body["bytes"], body.get("made_by"))
            end = self._handle.tell()
        self._handle.truncate(end)
        return dict(head["notes"])

    def _read_entry(self) -> tuple[Rows, int, Mapping[str, Any]] | None:
        entry = read_sealed(self._handle)
        if entry is None:
            return None
        body, packed = entry
        start = self._handle.tell() - len(packed) - 1
        return tuple(body["rows"]), start, body
