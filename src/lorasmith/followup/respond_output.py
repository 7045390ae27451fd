"""The finished output: responses in the data's order, log-probabilities as Parquet, failed rows aside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorasmith.errors import UsageError
from lorasmith.files.atomic import atomic_file, read_record
from lorasmith.files.digests import describe
from lorasmith.files.jsonl import read_rows
from lorasmith.followup.respond_store import Store, mixed_settings
from lorasmith.models.work import Arrays
from lorasmith.records.base import FileDigest
from lorasmith.records.followup import RespondRecord, RespondSettings

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


def pack_arrays(prompt: list[int], answer: Any) -> Arrays:
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
