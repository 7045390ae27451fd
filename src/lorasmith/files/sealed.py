"""Lines of JSON with a checksum of themselves and of the bytes that follow them; a file under one process."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from filelock import lock_descriptor

from lorasmith.errors import BusyError


def sealed_line(body: Mapping[str, Any], packed: bytes = b"") -> bytes:
    """A line of JSON with the checksum of itself and of what follows it."""
    text = json.dumps(body)
    return json.dumps({**body, "crc": zlib.crc32(text.encode() + packed)}).encode() + b"\n"


def sound(line: bytes, packed: bytes = b"") -> dict[str, Any] | None:
    """The line's content when the checksum is right, else None."""
    body = _parse(line)
    if body is None or body.pop("crc", None) != zlib.crc32(json.dumps(body).encode() + packed):
        return None
    return body


def read_sealed(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next line and the bytes that its `bytes` tells of, to their line end; None where that is torn."""
    line = file.readline()
    body = _parse(line)
    if body is None or not isinstance(body.get("bytes"), int):
        return None
    packed = file.read(body["bytes"])
    content = sound(line, packed)
    return None if content is None or file.read(1) != b"\n" else (content, packed)


def lock_file(file: BinaryIO, *, found: str, where: Path, remedy: str) -> None:
    """Take an open file's lock, which the kernel frees with the process; `BusyError` where it is held."""
    if not lock_descriptor(file.fileno(), blocking=False):
        raise BusyError(found, where=where, remedy=remedy)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(line)
    except ValueError:
        return None
    return body if line.endswith(b"\n") and isinstance(body, dict) else None
