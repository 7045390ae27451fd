"""JSONL streams in bounded memory: a wrong row is an error that names its line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorasmith.errors import DataError, os_errors
from lorasmith.files.atomic import atomic_file
from lorasmith.files.inputs import open_input
from lorasmith.parsing import parse_json
from lorasmith.records.dataset import Example

# What a file really holds, from its first bytes: pointers, web pages and foreign encodings are no data.


_HEAD_BYTES = 4096


@dataclass(frozen=True)
class WrongContent:
    """Why the file cannot be what its name says."""

    code: str
    found: str
    remedy: str


def is_gzip(path: Path) -> bool:
    """Whether the file is gzip by its content: people rename."""
    with os_errors(path, "read"), open_input(path) as handle:
        return handle.read(2) == b"\x1f\x8b"


def damaged_gzip(path: Path, error: Exception) -> DataError:
    """The message for an archive that cannot be unpacked to its end."""
    return DataError(
        f"the gzip archive is damaged or cut off ({error})", where=path, remedy="download it again"
    )


def head(path: Path) -> bytes:
    """The first bytes of the text, unpacked where it is gzip; raises `DataError` for a broken archive."""
    packed = is_gzip(path)
    with os_errors(path, "read"):
        try:
            with open_input(path) as file, gzip.open(file) if packed else nullcontext(file) as handle:
                return handle.read(_HEAD_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise damaged_gzip(path, error) from error


def wrong_content(start: bytes) -> WrongContent | None:
    """Judge the first bytes of a text file; None when nothing speaks against it."""
    lower = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:256].lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return WrongContent(
            "lfs-pointer", "this is a Git LFS pointer, not the data", "run `git lfs pull` in that repository"
        )
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return WrongContent(
            "html-page",
            "this is a web page, not the data",
            "download the file itself (the 'raw' link); a login page means that access is missing",
        )
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return WrongContent("utf-16", "this is UTF-16 text", "convert the file to UTF-8")
    if b"\x00" in start:
        return WrongContent(
            "nul-bytes", "there are NUL bytes in the text", "the file is damaged or not text: get it again"
        )
    if not start:
        return WrongContent("empty-file", "the file is empty", "get it again")
    return None


def require_text(path: Path, expected: str) -> None:
    """Raise `DataError` when the file is clearly no text of the `expected` kind; an empty one may pass."""
    fault = wrong_content(head(path))
    if fault is not None and fault.code != "empty-file":
        raise DataError(fault.found, where=path, expected=expected, remedy=fault.remedy)


MAX_LINE_BYTES = 64 << 20
"""A longer line is no row of a dataset but a wrong file, and would not fit in memory for long."""


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each JSON object with its line number from 1; gzip is unpacked on the way.

    Raises `DataError` naming file and line for what is not UTF-8, not JSON, not an object, or too long, and
    for a file that holds something else altogether. Empty lines are passed over.
    """
    for number, line in read_lines(path, "one JSON object a line"):
        if line.strip():
            yield number, parse_row(line, path, number)


def read_lines(path: Path, expected: str) -> Iterator[tuple[int, bytes]]:
    """Each line of a text file with its number from 1, unpacked, none longer than `MAX_LINE_BYTES`."""
    require_text(path, expected)
    with open_text(path) as handle:
        yield from bounded_lines(handle, path, expected)


def bounded_lines(stream: BinaryIO, path: Path, expected: str) -> Iterator[tuple[int, bytes]]:
    """Each line of an open text with its number from 1; `DataError` for one that is too long for a row."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise too_long(path, number, expected)
        yield number, line


def too_long(path: Path, number: int, expected: str) -> DataError:
    """The message about a line that is longer than a row may be."""
    return DataError(
        f"line {number} is longer than {MAX_LINE_BYTES >> 20} MiB",
        where=f"{path}:{number}",
        expected=expected,
    )


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where it is gzip; a damaged archive is a `DataError`."""
    packed = is_gzip(path)
    with os_errors(path, "read"):
        try:
            with open_input(path) as file, gzip.open(file) if packed else nullcontext(file) as handle:
                yield cast(BinaryIO, handle)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise damaged_gzip(path, error) from error


def parse_row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """One line as a JSON object."""
    where = f"{path}:{number}"
    try:
        row = load_json(line, may_have_mark=number == 1)
    except UnicodeError as error:
        raise DataError(
            "this line is not UTF-8 text",
            where=where,
            expected="JSONL in UTF-8",
            remedy="convert the file to UTF-8",
        ) from error
    except ValueError as error:
        # The line itself is not quoted: some benchmarks may not appear in plain text.
        raise DataError(
            f"this line is not JSON ({error})",
            where=where,
            expected="one JSON object a line",
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"this line is a JSON {type(row).__name__}", where=where, expected="a JSON object")
    return row


def load_json(raw: bytes, *, may_have_mark: bool = True) -> Any:
    """Parse JSON that can be written again: UTF-8 (a byte order mark may lead), no NaN, no half characters.

    Raises `UnicodeError` or `ValueError`.
    """
    value = parse_json(raw.decode("utf-8-sig" if may_have_mark else "utf-8"), finite=True)
    if b"\\ud" in raw.lower():
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair has no UTF-8 form
    return value


def dump_row(row: dict[str, Any]) -> bytes:
    """One canonical JSONL line."""
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows atomically, in their order."""
    with atomic_file(path) as handle:
        for row in rows:
            handle.write(dump_row(row))


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write a test set or training file atomically."""
    write_rows(path, (example.model_dump(mode="json") for example in examples))
