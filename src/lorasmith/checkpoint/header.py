"""The safetensors header: read strictly before a byte of data is trusted, and written canonically."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import CheckpointError, InputError, os_errors
from lorasmith.files.inputs import open_input
from lorasmith.parsing import parse_json

MAX_HEADER_BYTES = 32 << 20
"""Real headers need some 150 bytes a tensor; a longer one is an attack or a broken file."""

_LFS_POINTER = b"version https://git-lfs"

ITEM_BITS: dict[str, int] = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""The format's data types and their size; types below a byte are packed."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""The types that a merge can compute with."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header."""

    name: str
    dtype: str
    """The format's own name, such as `BF16`."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    stop: int
    """One past the last byte."""

    @property
    def elements(self) -> int:
        """The number of its elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header has been checked against its size."""

    path: Path
    size: int
    data_start: int
    """Header and its length field end here."""
    tensors: Mapping[str, TensorInfo]
    """Its tensors by name, in the order of their data."""


def nbytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor takes on disk; `dtype` is a name of `ITEM_BITS`."""
    return (math.prod(shape) * ITEM_BITS[dtype] + 7) // 8


def read_header(path: Path) -> TensorFile:
    """Read and check a file's header.

    Raises `CheckpointError` for anything the format forbids: a length beyond the file, JSON with doubled or
    unknown fields, unknown types, shapes that do not fit their bytes, ranges that overlap, leave holes or
    leave the file, and bytes behind the last tensor.
    """
    with os_errors(path, "read"), open_input(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        head = handle.read(len(_LFS_POINTER))
        if head == _LFS_POINTER:
            raise CheckpointError(
                "this is a Git LFS pointer, not the file itself", where=path, remedy="run `git lfs pull`"
            )
        if len(head) < 8:
            raise _damaged(path, f"the file has only {size} bytes")
        length = int.from_bytes(head[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, f"its header claims {length} bytes, more than {MAX_HEADER_BYTES}")
        if 8 + length > size:
            raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
        handle.seek(8)
        text = handle.read(length)
    entries = _parse(text, path)
    _check_metadata(entries.pop("__metadata__", {}), path)
    infos = sorted(
        (_entry(name, entry, 8 + length, size, path) for name, entry in entries.items()),
        key=lambda info: (info.start, info.stop, info.name),
    )
    _check_cover(infos, 8 + length, size, path)
    return TensorFile(path, size, 8 + length, {info.name: info for info in infos})


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[TensorInfo]]:
    """Length field and header for `(name, dtype, shape)` laid out in this order, and where each will lie.

    The data begins at a multiple of 8 bytes, padded with spaces as the format says.
    """
    body: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    placed = []
    position = 0
    for name, dtype, shape in tensors:
        stop = position + nbytes_of(dtype, shape)
        body[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        placed.append((name, dtype, shape, position, stop))
        position = stop
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    infos = [
        TensorInfo(name, dtype, shape, data_start + start, data_start + stop)
        for name, dtype, shape, start, stop in placed
    ]
    return len(text).to_bytes(8, "little") + text, infos


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _damaged(path, f"its header names {twice!r} twice")
        return entries

    if not text.startswith(b"{"):
        raise _damaged(path, "its header is no JSON object")
    try:
        header = parse_json(text, pairs_hook=once)
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    return header


def _check_metadata(value: Any, path: Path) -> None:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _damaged(path, "its __metadata__ is not an object of strings")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _entry(name: str, entry: Any, data_start: int, size: int, path: Path) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise _damaged(path, f"{name!r} has the unknown type {dtype!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(_is_count(extent) for extent in shape):
        raise _damaged(path, f"{name!r} has the impossible shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(place) for place in offsets):
        raise _damaged(path, f"{name!r} has the impossible range {str(offsets)[:80]}")
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if stop < start or stop > size:
        raise _damaged(path, f"the data of {name!r} ends at byte {stop}, the file at {size}")
    if stop - start != nbytes_of(dtype, shape):
        raise _damaged(
            path,
            f"{name!r} has {stop - start} bytes of data, its type {dtype} and shape {shape} need "
            f"{nbytes_of(dtype, shape)}",
        )
    return TensorInfo(name, dtype, tuple(shape), start, stop)


def _check_cover(infos: list[TensorInfo], data_start: int, size: int, path: Path) -> None:
    """Every byte of the data belongs to exactly one tensor, so nothing can hide or be read twice."""
    position = data_start
    for info in infos:
        if info.start != position:
            what = "overlaps its neighbour" if info.start < position else "leaves a hole before it"
            raise _damaged(path, f"the data of {info.name!r} {what} at byte {info.start}")
        position = info.stop
    if position != size:
        raise _damaged(path, f"{size - position} bytes lie behind the last tensor")


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"not a usable safetensors file: {found}",
        where=path,
        expected="a whole, well-formed safetensors file",
        remedy="fetch or save it again",
    )


# Small JSON files of a model or adapter folder, with a bound on their size.


MAX_JSON_BYTES = 64 << 20
"""The largest shard index seen in the wild is some 10 MB."""


def read_object(path: Path, kind: type[InputError]) -> dict[str, Any]:
    """A JSON object; raises `kind` for a file that is too long, not JSON or not an object."""
    with os_errors(path, "read"), open_input(path) as handle:
        text = handle.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise kind(f"the file is longer than {MAX_JSON_BYTES >> 20} MiB", where=path, expected="a JSON file")
    try:
        body = parse_json(text)
    except ValueError as error:
        raise kind(f"not JSON: {error}", where=path, expected="a JSON object") from error
    if not isinstance(body, dict):
        raise kind(f"this is a JSON {type(body).__name__}", where=path, expected="a JSON object")
    return body


def dump_object(body: dict[str, Any]) -> bytes:
    """JSON as transformers writes its configs: two spaces, sorted keys, a newline at the end."""
    return (json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
