"""What of a record is the same on every machine, and how two such values are compared."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

LEFT_OUT = {
    "version", "versions", "lorasmith_version", "transformers_version", "bytes", "arithmetic",
    "floor", "floor_layouts", "floor_same", "floor_examples", "serving", "serving_layouts", "worst",
}  # fmt: skip
"""Keys whose value depends on libraries, sizes of files that name them, or the processor."""
DECIDED = {
    "changed", "swallowed", "elements_swallowed", "swallowed_fraction", "exact_redone", "wrong",
    "max_ulps", "ulps", "differences", "flips", "divergences", "top1_agreement", "same", "same_fraction",
    "tokens_before_divergence", "unfinished_a", "unfinished_b",
}  # fmt: skip
"""Counts and lists that float32 arithmetic decides in a calibrated merge or between two forward passes."""
LONG = 6
"""A list of more items is kept as its length and a digest without its floats."""

_HASH = re.compile(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{16}…|\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
_NUMBER = re.compile(r"[-−+]?\d+(\.\d+)?e[-+]?\d+|[-−+]?\d+\.\d+")


def digest(content: bytes | str) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def digest_value(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return digest(json.dumps(value, sort_keys=True, ensure_ascii=False))


def comparable(value: Any, *, decided: bool = True) -> Any:
    """A JSON value without what differs between machines; `decided` false leaves out `DECIDED` as well."""
    if isinstance(value, dict):
        hidden = LEFT_OUT if decided else LEFT_OUT | DECIDED
        return {
            words(key): f"<{key}>" if key in hidden else comparable(inner, decided=decided)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        items = [comparable(item, decided=decided) for item in value]
        if len(items) <= LONG:
            return items
        return {"length": len(items), "without floats": digest_value(_without_floats(items))}
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return words(value) if isinstance(value, str) else value


def words(text: str) -> str:
    """A text without hashes, UUIDs, decimal numbers and the name of a float32 route."""
    text = re.sub(r"float32 \(\w+\)", "float32", text)
    return _NUMBER.sub("#", _HASH.sub("<hash>", text))


def _without_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_floats(item) for item in value]
    return "<float>" if isinstance(value, float) else value


def record(path: Path, *, decided: bool = True) -> Any:
    """A JSON file, comparable."""
    return comparable(json.loads(path.read_bytes()), decided=decided)


def table(path: Path) -> dict[str, Any]:
    """A Parquet file: its columns and types, the mean of each float column, a digest of the rest."""
    content = pq.read_table(path)
    columns: dict[str, Any] = {}
    for field in content.schema:
        values = content.column(field.name).to_pylist()
        flat = [x for value in values for x in (value if isinstance(value, list) else [value])]
        kept: Any
        floats = [x for x in flat if isinstance(x, float)]
        if field.name in LEFT_OUT:
            kept = f"<{field.name}>"
        elif floats:
            kept = float(f"{math.fsum(floats) / len(floats):.4g}")
        else:
            kept = digest_value(values)
        columns[field.name] = {"type": str(field.type), "kept": kept}
    return {"rows": content.num_rows, "columns": columns}


def differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """One line for each place where two comparable values are not the same."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            place = f"{where} / {key}"
            if key not in found:
                yield f"{place}: is gone"
            elif key not in expected:
                yield f"{place}: is new"
            else:
                yield from differences(expected[key], found[key], place)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, f"{where}[{index}]")
    elif isinstance(expected, float) and isinstance(found, float):
        # The package's docstring says why one in a hundred is far more than processors differ.
        if not math.isclose(expected, found, rel_tol=1e-2, abs_tol=1e-5):
            yield f"{where}: {found} in place of {expected}"
    elif type(expected) is not type(found) or expected != found:
        yield f"{where}: {found!r} in place of {expected!r}"
