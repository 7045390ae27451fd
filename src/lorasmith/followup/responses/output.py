"""Responses on disk: a journal while they are made, then files in the data's order.

The journal keeps each response as soon as its row ends, so that a kill costs the rows under way. The output
is written from it at the end: responses, log-probabilities as Parquet, failed rows aside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lorasmith.errors import UsageError
from lorasmith.files.atomic import atomic_file, read_record
from lorasmith.files.digests import describe
from lorasmith.files.journal import Entry, JournalFile
from lorasmith.files.jsonl import read_rows
from lorasmith.files.output_folder import require_own_file, require_own_record
from lorasmith.models.scoring import Arrays, pack_arrays, unpack_arrays
from lorasmith.records.base import FileDigest
from lorasmith.records.followup import RespondRecord, RespondSettings
from lorasmith.records.scoring import Conditions

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
    """A row that has its answer, or failed."""

    entry: Entry
    failed: bool


class ResponseJournal:
    """Responses while they are made, each on disk as soon as its row ends. Use as a context manager.

    An entry is a finished row with its log-probabilities, or the conditions that the rows after it were made
    under: they stand in the file once, and rows tell their number.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises `UsageError` for a file of other settings, `BusyError` for one that is in use."""
        self.rows: dict[str, FinishedRow] = {}
        """Finished rows by key."""
        self.origins: dict[str, AnswersOrigin] = {}
        """Where answers come from, by key, as far as it is known."""
        self._conditions: list[Conditions] = []
        self._file = JournalFile(
            path,
            {"format": _FORMAT, "settings": dict(settings)},
            busy="another process writes to the same output",
            remedy="wait until it ends, or choose another --output",
            sync_seconds=_SYNC_SECONDS,
        )
        if self._file.head.get("settings") != dict(settings):
            self._file.close()
            raise mixed_settings(path, self._file.head.get("settings"), settings)
        for entry, body in self._file.entries():
            if "conditions" in body:
                self._conditions.append(Conditions.model_validate(body["conditions"]))
                continue
            key = body["row"]["key"]
            self.rows[key] = FinishedRow(entry, bool(body["failed"]))
            if "made_by" in body:
                self.origins[key] = AnswersOrigin(body["group"], self._conditions[body["made_by"]])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(
        self,
        row: Mapping[str, Any],
        arrays: Arrays,
        *,
        failed: bool = False,
        origin: AnswersOrigin | None = None,
    ) -> None:
        """Keep a finished row; `row["key"]` names it."""
        body: dict[str, Any] = {"row": dict(row), "failed": failed}
        if origin is not None:
            body |= {"group": origin.group, "made_by": self._number(origin.conditions)}
            self.origins[row["key"]] = origin
        self.rows[row["key"]] = FinishedRow(self._file.append(body, pack_arrays(arrays)), failed)

    def _number(self, conditions: Conditions) -> int:
        """The number of these conditions in the file, into which they are written the first time."""
        if conditions not in self._conditions:
            self._file.append({"conditions": conditions.model_dump(mode="json")})
            self._conditions.append(conditions)
        return self._conditions.index(conditions)

    def row(self, key: str) -> dict[str, Any]:
        """A finished row as it was given to `add`."""
        return dict(self._file.body(self.rows[key].entry)["row"])

    def arrays(self, key: str) -> Arrays:
        """The arrays that were given to `add` with a row."""
        return unpack_arrays(self._file.packed(self.rows[key].entry))

    def remove(self) -> None:
        """Delete the journal: what it held is in the output now."""
        self._file.remove()


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

    def require_own(self) -> None:
        """Raise `UsageError` where something that this command has not written is in the way."""
        begun = self.record.exists() or self.journal.exists()
        require_own_file(self.output, "set of responses", lambda path: begun)
        require_own_record(self.record)

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
    def journal(self) -> Path:
        return self.output.with_name(f".{self.output.name}.journal")


def earlier_rows(places: Places, settings: RespondSettings) -> dict[str, dict[str, Any]]:
    """Rows of a finished output of the same settings by key, empty where there is no output yet.

    Raises `UsageError` for an output of other settings, and for a file that is no output of this command or
    was changed since.
    """
    if not places.output.exists():
        return {}
    begun = places.journal.exists()
    if not places.record.exists():
        return {}  # killed while it was published: the journal still has every row
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
    path: Path, keys: Iterable[str], journal: ResponseJournal, names: Mapping[str, Mapping[str, Any]]
) -> FileDigest:
    """The Parquet file: rows of an earlier output first, as they were, then those of the journal."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    earlier = path if path.exists() else None
    with atomic_file(path) as handle, pq.ParquetWriter(handle, _schema(), compression="zstd") as writer:
        if earlier:
            with pq.ParquetFile(earlier) as file:
                for number in range(file.num_row_groups):
                    kept = file.read_row_group(number)
                    fresh = [key not in journal.rows for key in kept["key"].to_pylist()]
                    # A killed command may have left the file of its own rows: an empty group would show that.
                    if any(fresh):
                        writer.write_table(kept.filter(pa.array(fresh)).cast(_schema()))
        for group in _groups(key for key in keys if key in journal.rows):
            writer.write_table(_table([(names[key], journal.arrays(key)) for key in group]))
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
