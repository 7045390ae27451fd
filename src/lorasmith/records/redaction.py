"""Rows whose text must not be published: they leave the machine as an id, a salted hash and scores.

GPQA asks that no example appears in plain text where a crawler could find it: reports and packages obey.
"""

from __future__ import annotations

import hashlib
from typing import Any

from lorasmith.records.base import Part
from lorasmith.records.dataset import Example

REDACTED_SOURCES = frozenset({"gpqa"})
"""Names of sources, in lower case, whose rows never show their text."""

_KEPT_METADATA = ("source", "domain", "difficulty", "difficulty_from", "record_id")


class Redacted(Part):
    """What stands in place of prompt and response."""

    salt: str
    sha256: str
    """Of salt, prompt and response, joined by NUL: who has the row can show that it is the one."""


def is_redacted(source: str) -> bool:
    """Whether rows of this source must not show their text: `GPQA-diamond`, `Idavidrein/gpqa`.

    Wherever the name stands in the source, since a row hidden for nothing costs less than one shown.
    """
    return any(hidden in source.lower() for hidden in REDACTED_SOURCES)


def salted_sha256(salt: str, prompt: str, response: str) -> str:
    """The hash that stands for a row's text."""
    return hashlib.sha256("\0".join((salt, prompt, response)).encode()).hexdigest()


def publishable_row(example: Example, salt: str) -> dict[str, Any]:
    """The row as it may leave the machine: whole, or without its text where its source forbids it."""
    if not is_redacted(example.metadata.source):
        return example.model_dump(mode="json")
    metadata = example.metadata.model_dump(mode="json")
    redacted = Redacted(salt=salt, sha256=salted_sha256(salt, example.prompt, example.response))
    return {
        "id": example.id,
        "redacted": redacted.model_dump(mode="json"),
        "metadata": {name: metadata[name] for name in _KEPT_METADATA},
    }
