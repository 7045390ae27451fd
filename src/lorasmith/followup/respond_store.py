"""Where responses are kept while they are made: each one on disk as soon as its row ends.

One file beside the output: a line of JSON with the settings, then for each row a line of JSON with its key,
length and checksum, the row's log-probabilities, and a line end. Conditions that rows were made under have a
line before the first of these rows. A torn end, as a kill leaves it, is cut off.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from lorasmith.errors import BusyError, UsageError, os_errors
from lorasmith.files.sealed import lock_file, read_sealed, sealed_line, sound
from lorasmith.models.work import Arrays, pack_arrays, unpack_arrays
from lorasmith.records.conditions import Conditions

_FORMAT = "lorasmith/respond-journal/1"
_SYNC_SECONDS = 1.0
"""A kill loses nothing that was written; only a power cut could lose what this last second gave."""


@dataclass(frozen=True)
class Origin:
    """Where one answer comes from."""

    group: str
    """Names the rows that were answered with it; empty for those of a command in one process."""
    conditions: Conditions


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
        self.origins: dict[str, Origin] = {}
        """Of those rows of which it is known."""
        self._conditions: list[Conditions] = []
        """Numbered as they are in the file."""
        self._synced = time.monotonic()
        with os_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle: BinaryIO = path.open("a+b")
            self._lock()
            head = self._read_head()
            if head is None:
                self._handle.truncate(0)
                self._append(sealed_line({"format": _FORMAT, "settings": dict(settings)}))
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

    def add(
        self, row: Mapping[str, Any], arrays: Arrays, *, failed: bool = False, origin: Origin | None = None
    ) -> None:
        """Keep a finished row; `row["key"]` names it."""
        packed = pack_arrays(arrays)
        body = {"row": dict(row), "failed": failed, "bytes": len(packed)}
        with os_errors(self.path, "write"):
            if origin is not None:
                body |= {"group": origin.group, "made_by": self._number(origin.conditions)}
                self.origins[row["key"]] = origin
            line = sealed_line(body, packed)
            start = self._append(line + packed + b"\n")
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                self._sync()
        self.rows[row["key"]] = Stored(start, len(line), len(packed), failed)

    def _number(self, conditions: Conditions) -> int:
        """Of these conditions in the file, into which they are written the first time."""
        if conditions not in self._conditions:
            self._append(sealed_line({"conditions": conditions.model_dump(mode="json"), "bytes": 0}) + b"\n")
            self._conditions.append(conditions)
        return self._conditions.index(conditions)

    def row(self, key: str) -> dict[str, Any]:
        """A finished row as it was given to `add`."""
        stored = self.rows[key]
        with os_errors(self.path, "read"):
            line = os.pread(self._handle.fileno(), stored.size, stored.start)
        return dict(json.loads(line)["row"])

    def arrays(self, key: str) -> Arrays:
        """Its arrays."""
        stored = self.rows[key]
        with os_errors(self.path, "read"):
            packed = os.pread(self._handle.fileno(), stored.packed, stored.start + stored.size)
        return unpack_arrays(packed)

    def remove(self) -> None:
        """Delete it: what it held is in the output now."""
        with os_errors(self.path, "remove"):
            self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            lock_file(
                self._handle,
                found="another process writes to the same output",
                where=self.path.parent,
                remedy="wait until it ends, or choose another --output",
            )
        except BusyError:
            self._handle.close()
            raise

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
        head = sound(self._handle.readline())
        return head if head is not None and head.get("format") == _FORMAT else None

    def _read_rows(self) -> None:
        end = start = self._handle.tell()
        while entry := read_sealed(self._handle):
            body, packed = entry
            end = self._handle.tell()
            line = end - start - len(packed) - 1
            if "conditions" in body:
                self._conditions.append(Conditions.model_validate(body["conditions"]))
            else:
                key = body["row"]["key"]
                self.rows[key] = Stored(start, line, len(packed), bool(body["failed"]))
                if "made_by" in body:
                    self.origins[key] = Origin(body["group"], self._conditions[body["made_by"]])
            start = end
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
