"""A journal on disk: finished work is kept entry by entry, so that a killed command goes on after the last.

One file: a line of JSON that says whose entries these are, then for each entry a line of JSON with its
length and a checksum, its packed bytes, and a line end. `JournalFile` is that file, whatever the entries
tell of; `Journal` holds results of chunks of rows in one, and `followup/responses` the rows it answered.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from filelock import lock_descriptor

from lorasmith.errors import BusyError, UsageError, os_errors


@dataclass(frozen=True)
class Entry:
    """Where one entry stands in the file."""

    start: int
    line_bytes: int
    """Length of its line of JSON."""
    packed_bytes: int
    """Length of what follows the line."""


class JournalFile:
    """An open journal of any kind, under one process. Use it, or what holds it, as a context manager."""

    def __init__(
        self,
        path: Path,
        head: Mapping[str, Any],
        *,
        busy: str = "another process works on the same output",
        remedy: str = "wait until it ends, or choose another output",
        sync_seconds: float = 0.0,
    ) -> None:
        """Keep the file's own head where that has the `format` of `head`, else begin anew with `head`.

        Entries may stay unsynced for `sync_seconds`: a kill loses none of them, a power cut may. Raises
        `BusyError` (`busy`, `remedy`) when another process has the journal open.
        """
        self.path, self._sync_seconds = path, sync_seconds
        self._synced = time.monotonic()
        self.head: dict[str, Any] = dict(head)
        with os_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink() or (path.exists() and not path.is_file()):
                # A pipe would be waited at for ever; through a link another file would be emptied.
                raise UsageError(
                    "the place of the journal is taken",
                    where=path,
                    expected="a file",
                    remedy="remove what is there",
                )
            # No buffer of Python's for what is appended: after a failed write it would try again on closing.
            self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                # The kernel frees this lock with the process, so none is left behind by a kill.
                if not lock_descriptor(self._fd, blocking=False):
                    raise BusyError(busy, where=path.parent, remedy=remedy)
                with os.fdopen(os.dup(self._fd), "rb") as file:
                    file.seek(0)
                    kept = _sound(file.readline())
                    self._first_entry = file.tell()
                if kept is None or kept.get("format") != head["format"]:
                    self.restart(head)
                else:
                    self.head = kept
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and free its lock."""
        if self._fd is not None:
            handle, self._fd = self._fd, None
            with os_errors(self.path, "write"):
                os.close(handle)

    def remove(self) -> None:
        """Delete the file: what it held is in the output now."""
        with os_errors(self.path, "remove"):
            self.path.unlink(missing_ok=True)

    def restart(self, head: Mapping[str, Any]) -> None:
        """Drop every entry and begin with another head."""
        with os_errors(self.path, "write"):
            os.truncate(self._open, 0)
            self.head = dict(head)
            self._write(_sealed_line(head))
            self._sync()
            self._first_entry = os.fstat(self._open).st_size

    def entries(self) -> Iterator[tuple[Entry, dict[str, Any]]]:
        """Every entry with what its line says. What follows the last sound one is cut off at the end."""
        with os_errors(self.path, "read"), os.fdopen(os.dup(self._open), "rb") as file:
            end = file.seek(self._first_entry)
            while (sealed := _read_sealed(file)) is not None:
                body, packed_bytes = sealed
                start, end = end, file.tell()
                # One byte is the entry's line end.
                yield Entry(start, end - start - packed_bytes - 1, packed_bytes), body
            # A torn entry is what a kill leaves. Appending behind it would hide all later entries.
            os.truncate(self._open, end)

    def append(self, body: Mapping[str, Any], packed: bytes = b"") -> Entry:
        """Write an entry; it is whole in the file when this returns, and not there at all when it raises."""
        line = _sealed_line({**body, "bytes": len(packed)}, packed)
        with os_errors(self.path, "write"):
            start = os.fstat(self._open).st_size
            try:
                self._write(line + packed + b"\n")
            except OSError:
                os.truncate(self._open, start)  # a full disk leaves no torn entry that hides the next one
                raise
            if time.monotonic() - self._synced >= self._sync_seconds:
                self._sync()
        return Entry(start, len(line), len(packed))

    def body(self, entry: Entry) -> dict[str, Any]:
        """What an entry's line says."""
        body: dict[str, Any] = json.loads(self._read(entry.start, entry.line_bytes))
        return body

    def packed(self, entry: Entry) -> bytes:
        """The bytes behind an entry's line."""
        return self._read(entry.start + entry.line_bytes, entry.packed_bytes)

    @property
    def _open(self) -> int:
        assert self._fd is not None, "the journal is closed"
        return self._fd

    def _read(self, start: int, size: int) -> bytes:
        with os_errors(self.path, "read"):
            return os.pread(self._open, size, start)

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._open, rest) :]

    def _sync(self) -> None:
        os.fsync(self._open)
        self._synced = time.monotonic()


def _sealed_line(body: Mapping[str, Any], packed: bytes = b"") -> bytes:
    """A line of JSON with the checksum of itself and of the bytes that follow it."""
    text = json.dumps(body)
    return json.dumps({**body, "crc": zlib.crc32(text.encode() + packed)}).encode() + b"\n"


def _sound(line: bytes, packed: bytes = b"") -> dict[str, Any] | None:
    """The line's content when the checksum is right, else None."""
    body = _parse(line)
    if body is None or body.pop("crc", None) != zlib.crc32(json.dumps(body).encode() + packed):
        return None
    return body


def _read_sealed(file: BinaryIO) -> tuple[dict[str, Any], int] | None:
    """The next entry's body and the length of its packed bytes; None where it is torn or damaged."""
    line = file.readline()
    body = _parse(line)
    if body is None or not isinstance(body.get("bytes"), int) or body["bytes"] < 0:
        return None
    packed = file.read(body["bytes"])
    content = _sound(line, packed)
    return None if content is None or file.read(1) != b"\n" else (content, len(packed))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return body if line.endswith(b"\n") and isinstance(body, dict) else None


Rows = tuple[int, ...]


class Journal:
    """Results of finished chunks of rows, and what computed each. Use as a context manager."""

    def __init__(self, path: Path, key: str, notes: Mapping[str, Any]) -> None:
        """`key` names inputs and settings: results under another key are dropped. `notes` are kept with it.

        Raises `BusyError` when another process has the journal open.
        """
        self.limit: int | None = None
        """Smallest size that did not fit in memory so far."""
        self._chunks: dict[Rows, Entry] = {}
        self._made_by: dict[Rows, Mapping[str, Any]] = {}
        self._rows: set[int] = set()
        head = {"format": "lorasmith/journal/1", "key": key, "notes": dict(notes)}
        self._file = JournalFile(path, head)
        if self._file.head.get("key") != key:
            self._file.restart(head)
        self.notes: dict[str, Any] = dict(self._file.head["notes"])
        for entry, body in self._file.entries():
            self.limit = body["limit"]
            self._remember(tuple(body["rows"]), entry, body.get("made_by"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, rows: Rows) -> bool:
        return rows in self._chunks

    def touches(self, rows: Rows) -> bool:
        """Whether some of these rows are done."""
        return not self._rows.isdisjoint(rows)

    def entries(self) -> Iterator[tuple[Rows, bytes]]:
        """Every chunk with its packed result, in the order of their making."""
        for rows in self.chunks():
            yield rows, self.read(rows)

    def chunks(self) -> list[Rows]:
        """The rows of every chunk, in the order of their making."""
        return list(self._chunks)

    def read(self, rows: Rows) -> bytes:
        """The packed result of one chunk; KeyError when it is not there."""
        return self._file.packed(self._chunks[rows])

    def made_by(self, rows: Rows) -> Mapping[str, Any] | None:
        """What computed a chunk, as `add` was told."""
        return self._made_by.get(rows)

    def add(
        self, rows: Rows, packed: bytes, limit: int | None, made_by: Mapping[str, Any] | None = None
    ) -> None:
        """Write a result, and what computed it, and sync it to disk."""
        entry = self._file.append({"rows": rows, "limit": limit, "made_by": made_by}, packed)
        self._remember(rows, entry, made_by)

    def remove(self) -> None:
        """Delete the journal: what it held is in the results now."""
        self._file.remove()

    def _remember(self, rows: Rows, entry: Entry, made_by: Mapping[str, Any] | None) -> None:
        self._chunks[rows] = entry
        if made_by is not None:
            self._made_by[rows] = made_by
        self._rows.update(rows)
