"""Files that are often taken for a benchmark, and lorasmith's own output, told from the first rows."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith.benchmarks.base import SourceRow

OWN_OUTPUT = "lorasmith"


def name_of(rows: Sequence[SourceRow]) -> str | None:
    """What all rows are, if it is something known: `GSM8K`, our own test set or record, else None."""
    if rows and all(is_gsm8k(row) for row in rows):
        return "GSM8K"
    if rows and all(_is_own(row) for row in rows):
        return OWN_OUTPUT
    return None


def is_gsm8k(row: SourceRow) -> bool:
    """GSM8K ends each answer with a line `#### 72`."""
    answer = row.value.get("answer")
    return "question" in row.value and isinstance(answer, str) and "\n#### " in "\n" + answer


def _is_own(row: SourceRow) -> bool:
    value = row.value
    if str(value.get("format", "")).startswith("lorasmith/"):
        return True
    metadata = value.get("metadata")
    return {"id", "prompt", "response"} <= value.keys() and isinstance(metadata, dict)
