"""The finished output: responses in the data's order, log-probabilities as Parquet, failed rows aside."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from lorasmith.errors import BusyError, UsageError, os_errors
from lorasmith.files.atomic import atomic_file, read_record
from lorasmith.files.digests import describe
from lorasmith.files.journal import lock_file, read_sealed, sealed_line, sound
from lorasmith.files.jsonl import read_rows
from lorasmith.models.scoring import Arrays, pack_arrays, unpack_arrays
from lorasmith.records.base import FileDigest
from lorasmith.records.followup import RespondRecord, RespondSettings
from lorasmith.records.scoring import Conditions

# Where responses are kept while they are made: each one on disk as soon as its row ends.
#
# One file beside the output: a line of JSON with the settings, then for each row a line of JSON with its
# key, length and checksum, the row's log-probabilities, and a line end. Conditions that rows were made under
# have a line before the first of these rows. A torn end, as a kill leaves it, is cut off.


_FORMAT = "lorasmith/respond-journal/1"
_SYNC_SECONDS = 1.0
"""A kill loses nothing that was written; only a power cut could lose what this last second gave."""


@dataclass(frozen=True)
class AnswersOrigin:
    """Where one answer comes from."""

    group: str
    """Names the rows that were answered with it; empty for those of a command in one process."""
    conditions: Conditions


@dataclass(frozen=True)
class FinishedRow:
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
        self.rows: dict[str, FinishedRow] = {}
        self.origins: dict[str, AnswersOrigin] = {}
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
        self,
        row: Mapping[str, Any],
        arrays: Arrays,
        *,
        failed: bool = False,
        origin: AnswersOrigin | None = None,
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
        self.rows[row["key"]] = FinishedRow(start, len(line), len(packed), failed)

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
                self.rows[key] = FinishedRow(start, line, len(packed), bool(body["failed"]))
                if "made_by" in body:
                    self.origins[key] = AnswersOrigin(body["group"], self._conditions[body["made_by"]])
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


_GROUP_ROWS = 256
"""Rows of a Parquet row group: what is in memory at once."""


@dataclass(frozen=True)
class Places:
    """The files of one output, all beside `NAME.jsonl`."""

    output: Path

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(self.output.name.removesuffix(".jsonl") + ending)

    @property
    def record(self) -> Path:
        return self._beside(".json")

    @property
    def logprobs(self) -> Path:
        return self._beside(".logprobs.parquet")

    @property
    def failed(self) -> Path:
        return self._beside(".failed.jsonl")

    @property
    def timing(self) -> Path:
        return self._beside(".timing.json")

    @property
    def chunks(self) -> Path:
        return self._beside(".chunks.jsonl")

    @property
    def store(self) -> Path:
        return self.output.with_name(f".{self.output.name}.journal")


def earlier_rows(places: Places, settings: RespondSettings) -> dict[str, dict[str, Any]]:
    """Rows of a finished output of the same settings by key, empty where there is no output yet.

    Raises `UsageError` for an output of other settings, and for a file that is no output of this command or
    was changed since.
    """
    if not places.output.exists():
        return {}
    begun = places.store.exists()
    if not places.record.exists():
        if begun:
            return {}  # killed while it was published: the journal still has every row
        raise UsageError(
            "the output exists and is not one of this command's",
            where=places.output,
            remedy="give another --output, or move the file away",
        )
    record = read_record(places.record, RespondRecord)
    if record.settings != settings:
        raise mixed_settings(places.output, record.settings.model_dump(), settings.model_dump())
    if not begun and describe([places.output], places.output.parent)[0] != record.output:
        raise UsageError(
            "the output was changed since it was written",
            where=places.output,
            remedy="move the changed file away and give the same command again, or choose another --output",
        )
    return {row["key"]: row for _, row in read_rows(places.output)}


def earlier_failures(places: Places) -> dict[str, dict[str, Any]]:
    """Rows set aside by an earlier command, by key."""
    if not places.failed.exists():
        return {}
    return {row["key"]: row for _, row in read_rows(places.failed)}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> FileDigest:
    """Write rows aside, then rename."""
    with atomic_file(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return describe([path], path.parent)[0]


def write_logprobs(
    path: Path, keys: Iterable[str], store: Store, names: Mapping[str, Mapping[str, Any]]
) -> FileDigest:
    """The Parquet file: rows of an earlier output first, as they were, then those of the store."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    earlier = path if path.exists() else None
    with atomic_file(path) as handle, pq.ParquetWriter(handle, _schema(), compression="zstd") as writer:
        if earlier:
            with pq.ParquetFile(earlier) as file:
                for number in range(file.num_row_groups):
                    kept = file.read_row_group(number)
                    fresh = [key not in store.rows for key in kept["key"].to_pylist()]
                    writer.write_table(kept.filter(pa.array(fresh)).cast(_schema()))
        for group in _groups(key for key in keys if key in store.rows):
            writer.write_table(_table([(names[key], store.arrays(key)) for key in group]))
    return describe([path], path.parent)[0]


def answer_arrays(prompt: list[int], answer: Any) -> Arrays:
    """What the Parquet file needs of one answer."""
    tokens = [*answer.tokens, *([] if answer.end is None else [answer.end])]
    return [
        np.array(prompt, dtype=np.int32),
        np.array(tokens, dtype=np.int32),
        np.array(answer.logprobs, dtype=np.float32),
        np.array([best for best, _ in answer.top], dtype=np.int32),
        np.array([values for _, values in answer.top], dtype=np.float32),
    ]


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("key", pa.string()),
            ("id", pa.string()),
            ("finish_reason", pa.string()),
            ("prompt", pa.list_(pa.int32())),
            ("tokens", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float32())),
            ("top_tokens", pa.list_(pa.list_(pa.int32()))),
            ("top_logprobs", pa.list_(pa.list_(pa.float32()))),
        ]
    )


def _table(rows: list[tuple[Mapping[str, Any], Arrays]]) -> Any:
    import pyarrow as pa

    names = ("key", "id", "finish_reason")
    columns = [[row[name] for row, _ in rows] for name in names]
    columns += [[list(arrays[place]) for _, arrays in rows] for place in range(5)]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, _schema(), strict=True)],
        schema=_schema(),
    )


def _groups(keys: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for key in keys:
        group.append(key)
        if len(group) == _GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group
