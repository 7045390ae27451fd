"""What a file really holds, from its first bytes: pointers, web pages and foreign encodings are no data."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import DataError, os_errors

_HEAD_BYTES = 4096


@dataclass(frozen=True)
class WrongContent:
    """Why the file cannot be what its name says."""

    code: str
    found: str
    remedy: str


def is_gzip(path: Path) -> bool:
    """By content: people rename."""
    with os_errors(path, "read"), path.open("rb") as handle:
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
            with gzip.open(path, "rb") if packed else path.open("rb") as handle:
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
