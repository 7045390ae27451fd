"""Rows to be answered, in the shapes that training files have: a prompt, a question, a conversation."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.data.layouts import known_layouts
from lorasmith.data.rows import Reading, iterate_rows
from lorasmith.errors import DataError
from lorasmith.models.chat_template import Message
from lorasmith.records.dataset import Example
from lorasmith.records.followup import RespondSettings


@dataclass(frozen=True)
class Row:
    """One row of the data file."""

    number: int
    """Its line, from 1."""
    id: str
    content: str
    """SHA-256 of the row's canonical JSON, and which of equal rows it is."""
    value: dict[str, Any]
    """The row as it stands in the file."""
    asked: Example | None
    """What the model gets, up to and with the last message that waits for an answer; None where there is a
    fault."""
    fault: str = ""
    """Why it cannot be answered."""

    @property
    def messages(self) -> list[Message]:
        """What the model gets, as messages; empty where there is a fault."""
        return [] if self.asked is None else [turn.message() for turn in self.asked.messages]

    @property
    def source(self) -> str:
        """Benchmark or file that the row names, for grouping."""
        metadata = self.value.get("metadata")
        named = metadata.get("source") if isinstance(metadata, dict) else None
        return str(named or self.value.get("source") or "all")

    def key(self, settings: RespondSettings) -> str:
        """What names its response: the row's content, template, model and sampling."""
        told = settings.model_dump()
        if not told["template_args"]:
            del told["template_args"]  # as it was before there were any: what was answered then still counts
        body = json.dumps({"row": self.content, **told}, sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()[:32]


def read_prompts(path: Path, limit: int | None = None) -> list[Row]:
    """All rows of a file, or the first `limit`; rows without a prompt keep their reason.

    Raises `DataError` for a file without rows, and when no row at all has a prompt.
    """
    rows: list[Row] = []
    seen: Counter[str] = Counter()
    for read in iterate_rows(path, Reading(answered=False)):
        if limit is not None and len(rows) == limit:
            break
        value = dict(read.value)
        sha256 = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        seen[sha256] += 1
        name = value.get("id")
        if name is None:
            metadata = value.get("metadata")
            name = metadata.get("record_id") if isinstance(metadata, dict) else None
        content = f"{sha256}:{seen[sha256]}"
        rows.append(Row(read.number, str(name or sha256[:16]), content, value, read.example, read.fault))
    if not rows:
        raise DataError("the file has no rows", where=path, expected=f"rows with {known_layouts()}")
    if all(row.fault for row in rows):
        raise DataError(
            f"none of the {len(rows)} rows has a prompt; the first: {rows[0].fault}",
            where=f"{path}:{rows[0].number}",
            expected=f"rows with {known_layouts()}, or a question without an answer",
            remedy="name the field that holds the prompt with --columns prompt=FIELD",
        )
    return rows
