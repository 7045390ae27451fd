"""Small JSON files of a model or adapter folder, with a bound on their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasmith.errors import InputError, os_errors

MAX_JSON_BYTES = 64 << 20
"""The largest shard index seen in the wild is some 10 MB."""


def read_object(path: Path, kind: type[InputError]) -> dict[str, Any]:
    """A JSON object; raises `kind` for a file that is too long, not JSON or not an object."""
    with os_errors(path, "read"), path.open("rb") as handle:
        text = handle.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise kind(f"the file is longer than {MAX_JSON_BYTES >> 20} MiB", where=path, expected="a JSON file")
    try:
        body = json.loads(text.decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise kind(f"not JSON: {error}", where=path, expected="a JSON object") from error
    if not isinstance(body, dict):
        raise kind(f"this is a JSON {type(body).__name__}", where=path, expected="a JSON object")
    return body


def dump_object(body: dict[str, Any]) -> bytes:
    """As transformers writes its configs: two spaces, sorted keys, a newline at the end."""
    return (json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
