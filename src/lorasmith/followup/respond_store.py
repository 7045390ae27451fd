"""Where responses are kept while they are made: each one on disk as soon as its row ends.

One file beside the output: a line of JSON with the settings, then for each row a line of JSON with its key,
length and checksum, the row's log-probabilities, and a line end. A torn end, as a kill leaves it, is cut off.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lorasmith.errors import BusyError, UsageError, os_errors

_FORMAT = "lorasmith/respond-journal/1"
_SYNC_SECONDS = 1.0
"""A kill loses nothing that was written; only a power cut could lose what this last second gave."""

Arrays = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class Stored:
    """A finished row: where it stands in the file."""

    start: int
    size: int
    packed: int
    failed: bool


class Store:
    """The open file; one process at a time. Use as a context manager."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises `UsageError` for a file of other settings, `BusyError` for one that is in use."""
        self.path = path
        self.rows: dict[str, Stored] = {}
        self._synced = time.monotonic()
        with os_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle: BinaryIO = path.open("a+b")
            self._lock()
            head = self._read_head()
            if head is None:
                self._handle.truncate(0)
                self._append(_line({"format": _FORMAT, "settings": dict(settings)}))
                self._sync()
                return
            if head.get("settings") != dict(settings):
                self._handle.close()
                raise mixed_settings(path, head.get("settings"), settings)
            self._read_rows()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with os_errors(self.path, "write"):
            if not self._handle.closed:
                self._handle.close()

    def add(self, row: Mapping[str, Any], arrays: Arrays, *, failed: bool = False) -> None:
        """Keep a finished row; `row["key"]` names it."""
        sink = io.BytesIO()
        for array in arrays:
            np.save(sink, array, allow_pickle=False)
        packed = sink.getvalue()
        line = _line({"row": dict(row), "failed": failed, "bytes": len(packed)}, packed)
        with os_errors(self.path, "write"):
            start = self._append(line + packed + b"\n")
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                self._sync()
        self.rows[row["key"]] = Stored(start, len(line), len(packed), failed)

    def row(self, key: str) -> dict[str, Any]:
        """A finished row as it was given to `add`."""
        stored = self.rows[key]
        with os_errors(self.path, "read"):
            line = os.pread(self._handle.fileno(), stored.size, stored.start)
        return dict(json.loads(line)["row"])

    def arrays(self, key: str) -> Arrays:
        """Its arrays."""
        stored, found = self.rows[key], []
        with os_errors(self.path, "read"):
            packed = os.pread(self._handle.fileno(), stored.packed, stored.start + stored.size)
        source = io.BytesIO(packed)
        while source.tell() < len(packed):
            found.append(np.load(source, allow_pickle=False))
        return found

    def remove(self) -> None:
        """Delete it: what it held is in the output now."""
        with os_errors(self.path, "remove"):
            self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._handle.close()
            raise BusyError(
                "another process writes to the same output",
                where=self.path.parent,
                remedy="wait until it ends, or choose another --output",
            ) from error

    def _append(self, content: bytes) -> int:
        start = self._handle.seek(0, os.SEEK_END)
        try:
            self._handle.write(content)
            self._handle.flush()
        except OSError:
            os.ftruncate(self._handle.fileno(), start)  # a full disk leaves no torn row behind
            raise
        return start

    def _sync(self) -> None:
        os.fsync(self._handle.fileno())
        self._synced = time.monotonic()

    def _read_head(self) -> dict[str, Any] | None:
        self._handle.seek(0)
        head = _sound(self._handle.readline())
        return head if head is not None and head.get("format") == _FORMAT else None

    def _read_rows(self) -> None:
        end = start = self._handle.tell()
        while line := self._handle.readline():
            body = _parse(line)
            if body is None or not isinstance(body.get("bytes"), int):
                break
            packed = self._handle.read(body["bytes"])
            if _sound(line, packed) is None or self._handle.read(1) != b"\n":
                break
            self.rows[body["row"]["key"]] = Stored(start, len(line), len(packed), bool(body["failed"]))
            end = start = self._handle.tell()
        self._handle.truncate(end)


def mixed_settings(where: Path, before: Any, now: Mapping[str, Any]) -> UsageError:
    """The message for an output that was begun otherwise, naming what differs."""
    old = before if isinstance(before, dict) else {}
    differ = [name for name in now if old.get(name) != now[name]]
    told = "; ".join(f"{name} was {old.get(name)!r}, now {now[name]!r}" for name in differ)
    return UsageError(
        f"the output holds responses made with other settings: {told}",
        where=where,
        expected="one set of settings in one output",
        remedy="give another --output, or the same settings; to begin anew, delete the output and this file",
    )


def _line(body: Mapping[str, Any], packed: bytes = b"") -> bytes:
    """A line of JSON with the checksum of itself and of what follows it."""
    text = json.dumps(body)
    return json.dumps({**body, "crc": zlib.crc32(text.encode() + packed)}).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(line)
    except ValueError:
        return None
    return body if line.endswith(b"\n") and isinstance(body, dict) else None


def _sound(line: bytes, packed: bytes = b"") -> dict[str, Any] | None:
    body = _parse(line)
    if body is None or body.pop("crc", None) != zlib.crc32(json.dumps(body).encode() + packed):
        return None
    return body
