"""The container of GGUF (ggml's specification, versions 2 and 3): metadata, and where each tensor lies.

Read strictly, and without a library: what is not needed here, vocabularies above all, is passed over.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lorasmith.errors import CheckpointError, os_errors
from lorasmith.files.inputs import open_input

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST = 1 << 24
"""Entries of a list, bytes of a text: vocabularies have a few hundred thousand."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    type: int
    """ggml's number of its type."""
    shape: tuple[int, ...]
    """Rows first, as everywhere but in the file."""
    start: int
    """First byte in the file."""


@dataclass(frozen=True)
class GgufFile:
    """The head of a file."""

    path: Path
    size: int
    data_start: int
    metadata: Mapping[str, Any]
    """Scalars and texts; lists are left out."""
    tensors: tuple[GgufTensor, ...]
    """In the order of their data."""


def read_gguf(path: Path) -> GgufFile:
    """Raises `CheckpointError` for anything that is no GGUF file of a known version."""
    with os_errors(path, "read"), open_input(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        try:
            return _read(path, size, handle)
        except (struct.error, UnicodeDecodeError, EOFError) as error:
            raise _damaged(path, f"its head ends or is damaged ({error})") from error


def _read(path: Path, size: int, handle: BinaryIO) -> GgufFile:
    if _take(handle, 4) != _MAGIC:
        raise _damaged(path, "it does not begin with GGUF")
    version = _number(handle, "<I")
    if version not in (2, 3):
        raise _damaged(path, f"its version is {version}")
    tensors, entries = _number(handle, "<Q"), _number(handle, "<Q")
    if tensors > _MOST or entries > _MOST:
        raise _damaged(path, f"it claims {tensors} tensors and {entries} entries of metadata")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        name = _text(handle)
        value = _value(handle, _number(handle, "<I"))
        if value is not None:
            metadata[name] = value
    described = [_describe(handle) for _ in range(tensors)]
    step = metadata.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1 or step & (step - 1):
        raise _damaged(path, f"its alignment is {step!r}")
    data_start = -(-handle.tell() // step) * step
    placed = sorted(
        (GgufTensor(name, kind, shape, data_start + offset) for name, shape, kind, offset in described),
        key=lambda tensor: tensor.start,
    )
    if len({tensor.name for tensor in placed}) != len(placed):
        raise _damaged(path, "it names a tensor twice")
    return GgufFile(path, size, data_start, metadata, tuple(placed))


def _describe(handle: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _text(handle)
    count = _number(handle, "<I")
    if count > 4:
        raise EOFError(f"{name} has {count} dimensions")
    extents = [_number(handle, "<Q") for _ in range(count)]
    if math.prod(extents) >= 1 << 62:
        raise EOFError(f"{name} has {extents} elements")
    kind, offset = _number(handle, "<I"), _number(handle, "<Q")
    return name, tuple(reversed(extents)), kind, offset


def _value(handle: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(handle)
    if kind == _ARRAY:
        inner, count = _number(handle, "<I"), _number(handle, "<Q")
        if count > _MOST:
            raise EOFError(f"a list of {count} entries")
        if inner in _SCALARS:
            _take(handle, count * struct.calcsize(_SCALARS[inner]))
        else:
            for _ in range(count):
                _value(handle, inner)
        return None
    if kind not in _SCALARS:
        raise EOFError(f"metadata of the type {kind}")
    return _number(handle, _SCALARS[kind])


def _text(handle: BinaryIO) -> str:
    length = _number(handle, "<Q")
    if length > _MOST:
        raise EOFError(f"a text of {length} bytes")
    return _take(handle, length).decode()


def _number(handle: BinaryIO, code: str) -> Any:
    return struct.unpack(code, _take(handle, struct.calcsize(code)))[0]


def _take(handle: BinaryIO, count: int) -> bytes:
    raw = handle.read(count)
    if len(raw) != count:
        raise EOFError("too short")
    return raw


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"not a usable GGUF file: {found}",
        where=path,
        expected="a whole GGUF file of version 2 or 3",
        remedy="fetch it again",
    )
