"""Rows out of any file: JSONL, JSON, CSV with or without a header, Parquet; text may be gzipped."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lorasmith.benchmarks.base import SourceRow
from lorasmith.errors import DataError, os_errors
from lorasmith.files import sniff
from lorasmith.files.jsonl import MAX_LINE_BYTES, load_json, open_text, read_lines, read_rows

KINDS = (".jsonl", ".json", ".csv", ".parquet")
MAX_DOCUMENT_BYTES = 512 << 20
"""A JSON document is parsed as a whole; the largest public one (DROP's training set) has 105 MB."""

Unpack = Callable[[Any], Iterable[dict[str, Any]] | None]


def kind_of(path: Path) -> str | None:
    """The suffix that tells the format, without `.gz`; None for a file that is no table."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] == ".gz":
        suffixes = suffixes[:-1]
    return suffixes[-1].lower() if suffixes and suffixes[-1].lower() in KINDS else None


def read_table(path: Path, name: str, unpack: Unpack) -> Iterator[SourceRow]:
    """The rows of a file with their numbers from 1; `name` is how the file is called in messages.

    A JSON document is given to `unpack` first. Raises `DataError` for a file that cannot be read to its end.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _parquet(path, name)
    elif kind == ".csv":
        yield from _csv(path, name)
    elif kind == ".json" and not _is_jsonl(path):
        yield from _json(path, name, unpack)
    else:
        yield from (SourceRow(name, number, row) for number, row in read_rows(path))


def _is_jsonl(path: Path) -> bool:
    """Many `.json` files of the hub hold one object a line: then the first line is a whole object."""
    sniff.require_text(path, "JSON")
    with open_text(path) as handle:
        first = handle.readline(MAX_LINE_BYTES)
        more = handle.readline(MAX_LINE_BYTES)
    try:
        return isinstance(json.loads(first), dict) and bool(more.strip())
    except (ValueError, RecursionError):
        return False


def _json(path: Path, name: str, unpack: Unpack) -> Iterator[SourceRow]:
    with open_text(path) as handle:
        content = handle.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"the document is larger than {MAX_DOCUMENT_BYTES >> 20} MiB",
            where=path,
            remedy="convert it to JSONL, which is read row by row",
        )
    try:
        document = load_json(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"this is not JSON, or it is cut off ({type(error).__name__})",
            where=path,
            expected="a JSON document in UTF-8",
            remedy="download it again",
        ) from error
    rows = unpack(document)
    if rows is None:
        rows = document if isinstance(document, list) else [document]
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield SourceRow(name, number, row)
        else:
            yield SourceRow(name, number, {}, f"a JSON {type(row).__name__} in place of an object")


def _csv(path: Path, name: str) -> Iterator[SourceRow]:
    reader = csv.reader(_decoded(path), strict=True)
    header: list[str] | None = None
    try:
        for number, cells in enumerate(reader, 1):
            if number == 1 and not _has_no_header(cells):
                header = [cell.strip() for cell in cells]
            elif cells:
                yield _csv_row(name, number, header, cells)
    except csv.Error as error:
        raise DataError(
            f"the CSV is damaged: {error}",
            where=f"{path}:{reader.line_num}",
            expected="every quote closed",
            remedy="download it again, or mend the quotes",
        ) from error


def _csv_row(name: str, number: int, header: list[str] | None, cells: list[str]) -> SourceRow:
    keys = header or [str(index) for index in range(len(cells))]
    problem = ""
    if len(keys) != len(cells):
        problem = f"the row has {len(cells)} columns and the header {len(keys)}"
    return SourceRow(name, number, dict(zip(keys, cells, strict=False)), problem)


def _has_no_header(cells: list[str]) -> bool:
    """Question, four choices and a letter: the only public layout without a header (MMLU)."""
    return len(cells) == 6 and cells[5].strip() in ("A", "B", "C", "D")


def _decoded(path: Path) -> Iterator[str]:
    """The lines as text, their ends kept: a quoted cell may hold line ends."""
    for number, line in read_lines(path, "CSV"):
        try:
            decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                "this line is not UTF-8 text", where=f"{path}:{number}", remedy="convert the file to UTF-8"
            ) from error
        if "\x00" in decoded:
            raise DataError("there is a NUL byte in this line", where=f"{path}:{number}", expected="CSV")
        yield decoded


def _parquet(path: Path, name: str) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fault = sniff.wrong_content(sniff.head(path)) if not _is_parquet(path) else None
    if fault is not None and fault.code != "nul-bytes":
        raise DataError(fault.found, where=path, expected="Parquet", remedy=fault.remedy)
    try:
        with os_errors(path, "read"), pq.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield SourceRow(name, number, row)
    except pa.ArrowException as error:
        raise DataError(
            "this is not Parquet, or it is damaged or cut off", where=path, remedy="download it again"
        ) from error


def _is_parquet(path: Path) -> bool:
    with os_errors(path, "read"), path.open("rb") as handle:
        return handle.read(4) == b"PAR1"
