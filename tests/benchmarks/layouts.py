"""Write the case files' rows to disk in the layouts that people have."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

from lorasmith.benchmarks.base import Benchmark, SourceRow
from lorasmith.benchmarks.discover import read_table

CASES = Path(__file__).parents[1] / "cases" / "benchmarks"


def case_file(name: str) -> dict[str, Any]:
    """The case file of a benchmark."""
    return dict(json.loads((CASES / f"{name.lower()}.json").read_text()))


def layout(name: str, wanted: str) -> dict[str, Any]:
    """One layout of a benchmark's case file."""
    return next(found for found in case_file(name)["layouts"] if found["name"] == wanted)


def write_layout(folder: Path, shape: dict[str, Any]) -> Path:
    """Write a layout of a case file below `folder`; the suffix tells the format."""
    path = folder / shape["file"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(shape["rows"]), path)
        return path
    if "document" in shape:
        content = json.dumps(shape["document"], indent=2)
    elif "cells" in shape:
        content = _csv(shape["cells"])
    elif path.name.endswith(".csv"):
        content = _csv([list(shape["rows"][0]), *(list(row.values()) for row in shape["rows"])])
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shape["rows"])
    raw = content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def _csv(cells: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(cells)
    return text.getvalue()


def rows_of(folder: Path, shape: dict[str, Any], benchmark: Benchmark) -> list[SourceRow]:
    """Write a layout and read it back."""
    path = write_layout(folder, shape)
    return list(read_table(path, shape["file"], benchmark.unpack))
