"""Rows as JSON objects, from any kind of file, in bounded memory: what a file is, its first bytes say.

JSONL, one JSON list, CSV and TSV, Parquet and Arrow, each as it is or packed by gzip or zstd. Whatever a
packed file claims to unpack to, no more of it is held than one row, or one batch of a table.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from lorasmith.errors import DataError, os_errors
from lorasmith.files import jsonl
from lorasmith.files.inputs import open_input
from lorasmith.files.jsonl import bounded_lines, damaged_gzip, parse_row, too_long, wrong_content
from lorasmith.parsing import parse_json

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
Advance = Callable[[int], None]

KINDS = "JSONL, a JSON list, CSV, TSV or Parquet, as it is or packed by gzip or zstd"
EXPECTED = f"rows as {KINDS}"
_GZIP, _ZSTD, _PARQUET, _ARROW = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1"
_SKIPPED_ZSTD = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""A frame that says nothing, which may lead (RFC 8878, section 3.1.2)."""
_ARROW_STREAM = b"\xff\xff\xff\xff"
"""How the files of `datasets.save_to_disk` begin: Arrow's form without an index at its end."""
_TABLES = (_PARQUET, _ARROW, _ARROW_STREAM)
_HEAD = 4096
_BATCH_ROWS = 32
"""Rows of a table at a time: one repeated value may be large, and costs a file next to nothing."""
_JSON_COLUMNS = frozenset(
    ("messages", "conversations", "conversation", "tools", "history", "chosen", "rejected", "metadata")
)
"""Columns of a CSV whose cells may hold JSON; a list that is an answer stays text."""
_CHUNK = 1 << 20
MAX_UNPACKED_TABLE = 1 << 36
"""A packed Parquet file has to lie on disk unpacked before it can be read: 64 GiB are no test set."""


def raw_rows(path: Path, advance: Advance | None = None) -> Iterator[tuple[int, Row]]:
    """Each row with its number from 1: its line in JSONL, its place in everything else.

    `advance` is told the bytes of each line that was read, or of a whole file of another kind at its end.

    Raises `DataError` naming file and row for what is no row, and for a file that is none of the kinds.
    """
    with unpacked(path) as stream:
        start = stream.peek(_HEAD)[:_HEAD]
        if start.startswith(_TABLES):
            yield from _table_rows(path, stream, start)
        else:
            _require_text(path, start)
            kind = _text_kind(path, start)
            if kind == "lines":
                yield from _line_rows(path, stream, advance)
                return
            yield from _list_rows(path, stream) if kind == "list" else _csv_rows(path, stream)
    if advance is not None:
        advance(path.stat().st_size)


def is_lines(path: Path) -> bool:
    """Whether a file has one row a line, so that rows can be taken out of it as lines."""
    with unpacked(path) as stream:
        start = stream.peek(_HEAD)[:_HEAD]
        return not start.startswith(_TABLES) and _text_kind(path, start) == "lines"


@contextmanager
def unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked where they are packed; a damaged archive is a `DataError`."""
    with os_errors(path, "read"), open_input(path) as file:
        magic = file.peek(4)[:4]
        try:
            if magic.startswith(_GZIP):
                with gzip.open(file) as opened:
                    yield io.BufferedReader(cast(Any, opened))
            elif magic.startswith(_ZSTD) or _SKIPPED_ZSTD.match(magic):
                yield io.BufferedReader(cast(Any, _Zstd(file, path)))
            else:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise damaged_gzip(path, error) from error


class _Zstd(io.RawIOBase):
    """A zstd archive as a stream: Arrow unpacks as much as is asked for, and tells of a cut-off frame."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        import pyarrow as pa

        self._path = path
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As the io module wants it."""
        try:
            read = self._stream.read(len(buffer))
        except OSError as error:
            raise DataError(
                f"the zstd archive is damaged or cut off ({error})",
                where=self._path,
                remedy="download it again",
            ) from error
        buffer[: len(read)] = read
        return len(read)


def _require_text(path: Path, start: bytes) -> None:
    fault = wrong_content(start)
    if fault is None and not start.strip(b"\xef\xbb\xbf \t\r\n"):
        fault = wrong_content(b"")
    if fault is not None and fault.code == "empty-file":
        raise DataError("the file has no rows", where=path, expected=EXPECTED)
    if fault is not None:
        raise DataError(fault.found, where=path, expected=KINDS, remedy=fault.remedy)


def _text_kind(path: Path, start: bytes) -> str:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"["):
        return "list"
    if text.startswith(b"{"):
        return "lines"
    names = [suffix.lower() for suffix in path.suffixes]
    if {".csv", ".tsv"} & set(names):
        return "csv"
    line = text.split(b"\n", 1)[0]
    # A header of names between commas, tabs or semicolons, under another suffix or none.
    looks_so = not {".jsonl", ".json", ".ndjson"} & set(names) and any(
        sign in line for sign in (b",", b"\t", b";")
    )
    return "csv" if looks_so else "lines"


def _line_rows(path: Path, stream: io.BufferedReader, advance: Advance | None) -> Iterator[tuple[int, Row]]:
    for number, line in bounded_lines(stream, path, EXPECTED):
        if advance is not None:
            advance(len(line))
        if line.strip():
            yield number, parse_row(line, path, number)


def _list_rows(path: Path, stream: io.BufferedReader) -> Iterator[tuple[int, Row]]:
    """The objects of one JSON list, one after the other: the list as a whole need not fit into memory."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    decoder = json.JSONDecoder()
    buffer, number, ended = "", 0, False
    wanted = "["
    """What comes next: the list's start, a value or the end, a comma or the end, a value."""
    try:
        while True:
            buffer = buffer.lstrip()
            if buffer and wanted in ("[", ",]"):
                if buffer[0] == "]" and wanted == ",]":
                    break
                if buffer[0] not in wanted:
                    raise _no_list(path, number + 1, f"{buffer[:1]!r} stands where a comma or ] should")
                wanted, buffer = ("value]" if wanted == "[" else "value"), buffer[1:]
                continue
            if buffer.startswith("]") and wanted == "value]":
                break
            taken = _first_value(decoder, buffer, ended) if wanted.startswith("value") else 0
            if taken:
                number += 1
                yield number, _object(buffer[:taken], path, number)
                wanted, buffer = ",]", buffer[taken:]
                continue
            if ended:
                raise _no_list(path, number + 1, "the list is not closed, or a row in it is not JSON")
            if len(buffer) > jsonl.MAX_LINE_BYTES:
                raise too_long(path, number + 1, EXPECTED)
            # Twice as much each time: a long row is not tried again for every megabyte.
            more = text.read(max(_CHUNK, len(buffer)))
            ended, buffer = not more, buffer + more
        if (buffer[1:] + text.read(_CHUNK)).strip():
            raise _no_list(path, number + 1, "something stands behind the end of the list")
    except UnicodeDecodeError as error:
        raise _no_list(path, number + 1, "this is not UTF-8 text") from error
    finally:
        text.detach()


def _first_value(decoder: json.JSONDecoder, buffer: str, ended: bool) -> int:
    """Where the first value of the buffer ends; 0 where it is not there in whole."""
    if not buffer:
        return 0
    try:
        _, end = decoder.raw_decode(buffer)
    except (ValueError, RecursionError):
        return 0
    # A number at the end of what was read may go on.
    return end if end < len(buffer) or ended else 0


def _object(text: str, path: Path, number: int) -> Row:
    try:
        row = parse_json(text, finite=True)
    except ValueError as error:
        raise _no_list(path, number, f"this is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _no_list(path, number, f"the list holds a JSON {type(row).__name__}")
    return row


def _no_list(path: Path, number: int, found: str) -> DataError:
    return DataError(found, where=f"{path}:{number}", expected="a JSON list of objects, or one object a line")


def _csv_rows(path: Path, stream: io.BufferedReader) -> Iterator[tuple[int, Row]]:
    """Rows of a table with a header; a cell of a column of messages may hold them as JSON."""
    csv.field_size_limit(jsonl.MAX_LINE_BYTES)
    # csv itself would read on for ever behind a quote that is not closed.
    lines = _decoded(bounded_lines(stream, path, EXPECTED))
    separator = _separator(stream.peek(_HEAD).split(b"\n", 1)[0])
    reader = csv.reader(lines, delimiter=separator, strict=True)
    number = 0
    try:
        header = next(reader)
        if len(set(header)) < len(header):
            raise DataError("two columns have one name", where=f"{path}:1", expected="a header of names")
        for cells in reader:
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                raise DataError(
                    f"row {number} has {len(cells)} cells, the header has {len(header)}",
                    where=f"{path}:{reader.line_num}",
                    expected=f"quotes around cells that hold {separator!r}, quotes or line breaks",
                )
            yield number, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True) if cell}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"this is no table ({error})", where=f"{path}:{reader.line_num}", expected="CSV in UTF-8"
        ) from error


def _separator(header: bytes) -> str:
    """What stands between the names of a header: tables with decimal commas have semicolons."""
    return next((sign for sign in (",", "\t", ";") if sign.encode() in header), ",")


def _decoded(lines: Iterator[tuple[int, bytes]]) -> Iterator[str]:
    for number, line in lines:
        yield line.decode("utf-8-sig" if number == 1 else "utf-8")


def _cell(name: str, cell: str) -> Any:
    if name in _JSON_COLUMNS and cell[:1] in "[{":
        try:
            return parse_json(cell, finite=True)
        except ValueError:
            return cell
    return cell


def _table_rows(path: Path, stream: io.BufferedReader, start: bytes) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa

    number = 0
    try:
        with _seekable(path, stream) as file:
            for batch in _batches(file, start):
                if batch.nbytes > jsonl.MAX_LINE_BYTES * _BATCH_ROWS:
                    raise too_long(path, number + 1, EXPECTED)
                for row in _rows_of(batch):
                    number += 1
                    yield number, _plain(row)
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        kind = "Parquet" if start.startswith(_PARQUET) else "Arrow"
        raise DataError(
            f"the {kind} file is damaged, or holds values that are no text or JSON "
            f"({' '.join(str(error).split())[:200]})",
            where=f"{path}:{number + 1}",
            remedy="download it again, or convert it to JSONL",
        ) from error


UNREADABLE = "cannot be read"
"""Stands with the reason for a value of a table that has no form in Python, such as a late time."""


def _rows_of(batch: pa.RecordBatch) -> list[Row]:
    """The rows of a batch; a column that cannot be read holds the reason, since perhaps nobody needs it."""
    try:
        return cast(list[Row], batch.to_pylist())
    except (ValueError, OverflowError, UnicodeDecodeError):
        columns: dict[str, list[Any]] = {}
        for name in batch.schema.names:
            column = batch.column(name)
            try:
                columns[name] = column.to_pylist()
            except (ValueError, OverflowError, UnicodeDecodeError) as error:
                columns[name] = [{UNREADABLE: " ".join(str(error).split())[:200]}] * len(column)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> Any:
    """A row as JSON has it, without fields that hold nothing: tables fill what rows lack, messages too."""
    if isinstance(value, dict):
        kept = {name: _plain(one) for name, one in value.items()}
        return {name: one for name, one in kept.items() if one is not None}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, str | int | bool | None):
        return value
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {UNREADABLE: "bytes that are no text"}
    return str(value)  # times and decimals


def _batches(file: BinaryIO, start: bytes) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if start.startswith(_PARQUET):
        yield from pq.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS)
    elif start.startswith(_ARROW):
        with pa.ipc.open_file(file) as reader:
            for place in range(reader.num_record_batches):
                yield from _small(reader.get_batch(place))
    else:
        with pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield from _small(batch)


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        yield batch.slice(start, _BATCH_ROWS)


@contextmanager
def _seekable(path: Path, stream: io.BufferedReader) -> Iterator[BinaryIO]:
    """A table is read from its end: what is packed is unpacked into a temporary file first."""
    if stream.seekable() and isinstance(getattr(stream, "raw", None), io.FileIO):
        yield stream
        return
    with tempfile.TemporaryFile() as whole:
        held = 0
        while chunk := stream.read(_CHUNK):
            held += len(chunk)
            if held > min(MAX_UNPACKED_TABLE, shutil.disk_usage(tempfile.gettempdir()).free):
                raise DataError(
                    f"the packed table is larger than {held:,} bytes", where=path, remedy="unpack it yourself"
                )
            whole.write(chunk)
        whole.seek(0)
        yield cast(BinaryIO, whole)
