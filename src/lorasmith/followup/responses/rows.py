"""Rows to be answered, in the shapes that training files have: a prompt, a question, a conversation."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import DataError
from lorasmith.files.jsonl import read_rows
from lorasmith.models.chat_template import Message
from lorasmith.records.followup import RespondSettings

_PROMPTS = ("prompt", "question", "instruction", "problem")
_CONVERSATIONS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
"""Names of the ShareGPT layout."""

SHAPES = 'one of "prompt", "question", "instruction" (with "input"), "problem", "messages", "conversations"'


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
    messages: list[Message]
    """What the model gets, up to and with the last user message; empty where there is a fault."""
    fault: str = ""
    """Why it cannot be answered."""

    @property
    def source(self) -> str:
        """Benchmark or file that the row names, for grouping."""
        metadata = self.value.get("metadata")
        named = metadata.get("source") if isinstance(metadata, dict) else None
        return str(named or self.value.get("source") or "all")

    def key(self, settings: RespondSettings) -> str:
        """What names its response: the row's content, template, model and sampling."""
        body = json.dumps({"row": self.content, **settings.model_dump()}, sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()[:32]


def read_prompts(path: Path, limit: int | None = None) -> list[Row]:
    """All rows of a JSONL file, or the first `limit`; rows without a prompt keep their reason.

    Raises `DataError` for a file without rows, and when no row at all has a prompt.
    """
    rows: list[Row] = []
    seen: Counter[str] = Counter()
    for number, value in read_rows(path):
        if limit is not None and len(rows) == limit:
            break
        sha256 = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        seen[sha256] += 1
        messages, fault = find_messages(value)
        name = value.get("id")
        if name is None:
            metadata = value.get("metadata")
            name = metadata.get("record_id") if isinstance(metadata, dict) else None
        rows.append(Row(number, str(name or sha256[:16]), f"{sha256}:{seen[sha256]}", value, messages, fault))
    if not rows:
        raise DataError("the file has no rows", where=path, expected=f"one JSON object a line with {SHAPES}")
    if all(row.fault for row in rows):
        raise DataError(
            f"none of the {len(rows)} rows has a prompt; the first: {rows[0].fault}",
            where=f"{path}:{rows[0].number}",
            expected=SHAPES,
            remedy="rename the field that holds the prompt",
        )
    return rows


def find_messages(row: Mapping[str, Any]) -> tuple[list[Message], str]:
    """The conversation that waits for an answer, or an empty list and the reason."""
    for name in _CONVERSATIONS:
        if name in row:
            return _conversation(row[name], name)
    for name in _PROMPTS:
        if name not in row:
            continue
        value = row[name]
        if isinstance(value, list):
            return _conversation(value, name)
        if not isinstance(value, str):
            return [], f"the field {name!r} is not text"
        if not value.strip():
            return [], f"the field {name!r} is empty"
        more = row.get("input") if name == "instruction" else None
        if isinstance(more, str) and more.strip():
            value = f"{value}\n\n{more}"
        return [{"role": "user", "content": value}], ""
    return [], "the row has no prompt"


def _conversation(turns: Any, name: str) -> tuple[list[Message], str]:
    if not isinstance(turns, list) or not turns:
        return [], f"the field {name!r} is not a list of messages"
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict):
            return [], f"the field {name!r} holds something other than messages"
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return [], f"a message of {name!r} has no role or no text"
        messages.append({"role": _ROLES.get(role, role), "content": content})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()  # the answer that the row was made for
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        return [], f"the last message of {name!r} before the answer is not from the user"
    return messages, ""
