"""Model and adapter folders as the proof reads them: files, shard index and headers, problems noted."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorasmith.errors import InputError, os_errors
from lorasmith.files.digests import identity
from lorasmith.parsing import parse_json
from lorasmith.records.base import Finding

# The bytes of a file under proof: what is hashed is what is checked, read once and past the page cache.
#
# Parts are asked for by several threads, mostly in the order of the file. Each part that was read is hashed
# as soon as all before it are; only gaps that nobody asked for are read for the hash alone.


_PAGE = 4096
"""Offsets, lengths and addresses of direct reads are multiples of it."""
_DIRECT_BYTES = 1 << 20
"""From here on a part is read past the page cache; smaller ones are cheaper through it."""
_GAP_BYTES = 8 << 20
"""Read at a time where only the hash needs it."""
_HELD_BYTES = 64 << 20
"""Parts that may wait for what stands before them in the file."""


class ProvenFile:
    """One file, as it was when it was first read. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with os_errors(path, "read"):
            self._file = path.open("rb", buffering=0)
            self._opened = identity(os.fstat(self._file.fileno()))
        self.size: int = os.fstat(self._file.fileno()).st_size
        """In bytes."""
        self._direct_failed = False
        self._hash: Any = hashlib.sha256()
        self._hashed = 0
        self._waiting: dict[int, memoryview] = {}
        self._hashing = False
        self._state = threading.Condition()

    def read(self, start: int, count: int) -> torch.Tensor:
        """[count] uint8 from byte `start` on; raises `InputError` where the file ends before."""
        with os_errors(self.path, "read"):
            part = self._read(start, count)
        self._offer(start, part.numpy().data)
        return part

    def digest(self) -> str:
        """SHA-256 of the whole file; reads what has not been read. For use when all parts have been taken.

        Raises `InputError` if the file was changed since it was opened.
        """
        with os_errors(self.path, "read"):
            while self._hashed < self.size:
                self._advance(reading=True)
            with self.path.open("rb") as now:
                unchanged = identity(os.fstat(now.fileno())) == self._opened
        if not unchanged:
            raise InputError(
                "the file changed while it was read",
                where=self.path,
                remedy="wait until nothing writes to it",
            )
        return str(self._hash.hexdigest())

    @property
    def data_start(self) -> int:
        """First byte behind the header of a safetensors file."""
        with os_errors(self.path, "read"):
            length = self._read(0, 8)
        return 8 + int.from_bytes(length.numpy().tobytes(), "little")

    @cached_property
    def _direct(self) -> FileIO | None:
        """The same file without the page cache; None where the file system has no such thing."""
        if not hasattr(os, "O_DIRECT"):
            return None
        try:
            file = open(self.path, "rb", buffering=0, opener=_open_direct)  # noqa: SIM115 (closed with self)
        except OSError:
            return None
        return file if identity(os.fstat(file.fileno())) == self._opened else None

    def _read(self, start: int, count: int) -> torch.Tensor:
        if count >= _DIRECT_BYTES and not self._direct_failed and (file := self._direct) is not None:
            first = start // _PAGE * _PAGE
            length = -(-(start + count - first) // _PAGE) * _PAGE
            memory = torch.empty(length + _PAGE, dtype=torch.uint8)
            shift = -memory.data_ptr() % _PAGE
            pages = memory[shift : shift + length]
            try:
                self._fill(file, pages, first, start + count - first)
            except OSError:
                self._direct_failed = True
            else:
                return pages[start - first : start - first + count]
        part = torch.empty(count, dtype=torch.uint8)
        self._fill(self._file, part, start, count)
        return part

    def _fill(self, file: FileIO, part: torch.Tensor, start: int, needed: int) -> None:
        view, done = part.numpy().data, 0
        while done < needed:
            # A direct read may stop short only at the end of the file, so that `done` stays a multiple.
            got = os.preadv(file.fileno(), [view[done:]], start + done)
            if not got:
                raise InputError(
                    f"the file ends at byte {start + done:,}",
                    where=self.path,
                    expected=f"{self.size:,} bytes",
                )
            done += got

    def _offer(self, start: int, part: memoryview) -> None:
        """Hash a part if it is the next one, and what waited for it; else let it wait, unless too many do."""
        with self._state:
            if start + len(part) <= self._hashed or not len(part):
                return
            if len(part) > len(self._waiting.get(start, b"")):
                self._waiting[start] = part
            while self._hashing and self._held > _HELD_BYTES:
                self._state.wait()  # what is read must not pile up before the hash
            if self._hashing:
                return
            self._hashing = True
        try:
            while self._advance(reading=False):
                pass
        finally:
            with self._state:
                self._hashing = False
                self._state.notify_all()

    @property
    def _held(self) -> int:
        return sum(len(part) for part in self._waiting.values())

    def _advance(self, *, reading: bool) -> bool:
        """Hash the next part if it is there, or read it where parts behind it have piled up."""
        with self._state:
            part = self._next()
            if part is None:
                if not reading and self._held <= _HELD_BYTES:
                    return False
                end = min(self._waiting, default=self.size)
        if part is None:
            count = min(end - self._hashed, _GAP_BYTES)
            part = self._read(self._hashed, count).numpy().data
        self._hash.update(part)  # without the lock: hashing lets other threads go on
        with self._state:
            self._hashed += len(part)
            self._state.notify_all()
        return True

    def _next(self) -> memoryview | None:
        """What stands at the hash's place, taken out; parts that lie behind it are let go."""
        part = self._waiting.pop(self._hashed, None)
        if part is not None:
            return part
        for start in [start for start in self._waiting if start < self._hashed]:
            part = self._waiting.pop(start)
            if start + len(part) > self._hashed:
                return part[self._hashed - start :]
        return None


def _open_direct(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_DIRECT)


# Single tensors as the proof reads them: rows of a file, at the place that `safetensors` gives them.


DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.uint8,
    "F8_E8M0": torch.uint8,
}
"""Names of element types in a safetensors header; 8-bit floats are read as their bytes, others not at all."""

BYTES: Mapping[str, int] = {
    **{name: dtype.itemsize for name, dtype in DTYPES.items()},
    "F8_E5M2": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "C64": 8,
}
"""Sizes of elements; beyond those that are read, what it takes to find the next tensor."""

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class ProvenTensor:
    """One tensor of a file: where it is and what it looks like, without its values."""

    source: ProvenFile
    start: int
    """Byte of the file where its values begin."""
    name: str
    dtype: str
    shape: tuple[int, ...]
    decode: Callable[[int, int], torch.Tensor] | None = None
    """For a quantized weight: the values of some elements from the first on, flat in float64."""
    model_dtype: str = ""
    """The type that the model has such a weight in."""

    @property
    def file(self) -> Path:
        """The file that it stands in."""
        return self.source.path

    @property
    def elements(self) -> int:
        """1 for a tensor without dimensions."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of its values on disk."""
        return self.elements * BYTES[self.dtype]

    @property
    def columns(self) -> int:
        """Width of the matrix that `rows` shows: the last dimension, or 1 for a vector."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    def rows(self, index: Index = ()) -> torch.Tensor:
        """The part at `index` (whole numbers, then perhaps a slice), as a matrix [rows, columns].

        Raises `InputError` where the file cannot be read any more.
        """
        first, count = 0, self.elements
        for size, at in zip(self.shape, index, strict=False):
            count //= size
            low, high = (at.start, at.stop) if isinstance(at, slice) else (at, at + 1)
            first += low * count
            if isinstance(at, slice):
                count *= high - low
        return self.flat(first, count).reshape(-1, self.columns)

    def flat(self, first: int, count: int) -> torch.Tensor:
        """Some elements, counted through the whole tensor."""
        if self.decode is not None:
            return self.decode(first, count)
        width, dtype = BYTES[self.dtype], DTYPES[self.dtype]
        raw = self.source.read(self.start + first * width, count * width)
        if raw.storage_offset() % width:
            raw = raw.clone()  # a file need not align its tensors, but a view of numbers must
        return raw.view(dtype)

    def whole(self) -> torch.Tensor:
        """All values in the tensor's own shape."""
        return self.rows().reshape(self.shape)


_MAX_JSON_BYTES = 64 << 20


@dataclass
class TensorFolder:
    """The tensors of a folder, and what is wrong with its files."""

    path: Path
    tensors: dict[str, ProvenTensor] = field(default_factory=dict)
    files: list[ProvenFile] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    """What a person must know; nothing here is raised, so that a damaged merge can be graded."""

    @property
    def first_type(self) -> str:
        """The type of the first floating-point tensor, which a loader takes where the config has none."""
        types = (DTYPES[stored.model_dtype or stored.dtype] for stored in self.tensors.values())
        first = next((kind for kind in types if kind.is_floating_point), torch.float32)
        return str(first).removeprefix("torch.")

    def problem(self, code: str, message: str, where: str | Path, expected: str | None = None) -> None:
        """Note an error."""
        self.problems.append(
            Finding(severity="error", code=code, message=message, where=str(where), expected=expected)
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `InputError` naming the file."""
    with os_errors(path, "read"):
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise InputError(f"the file has {size} bytes", where=path, expected="a JSON file of a few kB")
        content = path.read_bytes()
    try:
        body = parse_json(content)
    except ValueError as error:
        raise InputError(f"this is not JSON: {error}", where=path, expected="a JSON object") from error
    if not isinstance(body, dict):
        raise InputError("this is JSON, but no object", where=path, expected="a JSON object")
    return body


def open_model(path: Path, *, released: bool = False) -> TensorFolder:
    """The tensors of a model folder: `model.safetensors`, or the shards of its index.

    `released` folders are held to what loaders want beyond the tensors: the header's format, the index's
    total size. Raises `InputError` where there is no such folder or it holds neither file; all else becomes
    a problem.
    """
    with os_errors(path, "read"):
        if not path.is_dir():
            raise InputError("there is no such folder", where=path, expected="a model folder")
    folder = TensorFolder(path)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.is_file():
        if single.is_file():
            folder.problem(
                "two-checkpoints",
                "there is a shard index and a model.safetensors beside it, and loaders take the latter",
                single,
                "one of them",
            )
        _read_index(folder, index, released)
    elif single.is_file():
        folder.tensors = dict(_read_header(folder, single, released))
    else:
        raise InputError(
            "the folder holds no safetensors checkpoint",
            where=path,
            expected="model.safetensors, or model.safetensors.index.json and its shards",
            remedy="convert a pickle checkpoint with transformers' save_pretrained first",
        )
    return folder


def open_file(path: Path) -> TensorFolder:
    """The tensors of one safetensors file."""
    folder = TensorFolder(path.parent)
    folder.tensors = dict(_read_header(folder, path, released=False))
    return folder


def _read_index(folder: TensorFolder, index: Path, released: bool) -> None:
    try:
        body = read_json(index)
    except InputError as error:
        folder.problem("damaged-index", error.found, index)
        return
    wanted = body.get("weight_map")
    if not isinstance(wanted, dict) or not all(isinstance(file, str) for file in wanted.values()):
        folder.problem("damaged-index", "the index has no weight_map of names", index)
        return
    shards: dict[str, dict[str, ProvenTensor]] = {}
    for file in sorted(set(wanted.values())):
        shard = folder.path / file
        if Path(file).name != file or not file.endswith(".safetensors"):
            folder.problem("index-escapes", f"the index names the file {file!r}", index, "a shard beside it")
        elif not shard.is_file():
            folder.problem("missing-shard", f"the shard {file!r} is missing", index)
        else:
            shards[file] = dict(_read_header(folder, shard, released))
    for name, file in wanted.items():
        if file in shards and name not in shards[file]:
            folder.problem("index-lies", f"tensor {name!r} is not in {file!r}, where the index has it", index)
    for file, tensors in shards.items():
        for name, stored in tensors.items():
            if wanted.get(name) != file:
                folder.problem("index-lies", f"tensor {name!r} of {file!r} is not in the index", index)
            folder.tensors.setdefault(name, stored)
    if released:
        _check_total(folder, body, index)


def _check_total(folder: TensorFolder, body: dict[str, Any], index: Path) -> None:
    metadata = body.get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(stored.bytes for stored in folder.tensors.values())
    if claimed is not None and claimed != actual and not folder.problems:
        folder.problem("index-lies", f"the index has total_size {claimed}", index, str(actual))


def _read_header(folder: TensorFolder, path: Path, released: bool) -> Iterator[tuple[str, ProvenTensor]]:
    """The tensors of a file, as `safetensors` finds them: it accepts no gaps, so sizes tell the places."""
    file = ProvenFile(path)
    folder.files.append(file)
    try:
        with os_errors(path, "read"), safe_open(path, framework="pt") as handle:
            described = []
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                described.append((name, part.get_dtype(), tuple(part.get_shape())))
            kind = (handle.metadata() or {}).get("format")
    except SafetensorError as error:
        folder.problem("damaged-file", f"this is no intact safetensors file: {error}", path)
        return
    except UnicodeDecodeError as error:
        folder.problem("damaged-file", f"the header is not UTF-8: {error.reason}", path)
        return
    if released and kind != "pt":
        folder.problem("wrong-metadata", f"the header's format is {kind!r}", path, "'pt'")
    start = file.data_start
    for name, dtype, shape in described:
        if dtype not in DTYPES:
            folder.problem("unknown-dtype", f"tensor {name!r} is stored as {dtype}", path)
        if dtype not in BYTES:
            folder.problem("unknown-dtype", f"what follows {name!r} was not checked", path)
            return
        stored = ProvenTensor(file, start, name, dtype, shape)
        start += stored.bytes
        if dtype in DTYPES:
            yield name, stored
    if start != file.size:
        folder.problem("damaged-file", f"the tensors end at byte {start:,}", path, f"{file.size:,} bytes")
