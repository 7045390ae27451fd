"""One shard from disk to disk, in bounded memory, with the SHA-256 of what is read and written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from lorasmith.checkpoint.header import ITEM_BITS, TensorFile, build_header
from lorasmith.errors import CheckpointError, os_errors
from lorasmith.merging.plan import Output
from lorasmith.merging.recipes import Recipe
from lorasmith.progress import Advance
from lorasmith.records.base import FileDigest

CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Written:
    """A shard that is on disk and synced."""

    file: FileDigest
    source_sha256: str


def shard_header(outputs: Sequence[Output]) -> tuple[bytes, int]:
    """The merged shard's header, and the whole file's size."""
    header, placed = build_header(
        ((output.name, output.dtype, output.shape) for output in outputs), {"format": "pt"}
    )
    return header, placed[-1].stop if placed else len(header)


def write_shard(
    source: TensorFile, outputs: Sequence[Output], recipes: Sequence[Recipe], path: Path, advance: Advance
) -> Written:
    """Write a merged shard; `outputs` are in the order of the source's data."""
    header, size = shard_header(outputs)
    digest = hashlib.sha256(header)
    with os_errors(path, "write"), path.open("wb") as sink, source.path.open("rb") as origin:
        read = hashlib.sha256()
        _read(origin, source.data_start, read)
        sink.write(header)
        for output, recipe in zip(outputs, recipes, strict=True):
            for first, raw in _pieces(origin, output, read):
                made = recipe.piece(raw, first).numpy().data
                digest.update(made)
                sink.write(made)
                advance(len(made))
        sink.flush()
        os.fsync(sink.fileno())
        if sink.tell() != size or origin.tell() != source.size:
            raise CheckpointError("the shard changed while it was read", where=source.path)
    return Written(FileDigest(path=path.name, bytes=size, sha256=digest.hexdigest()), read.hexdigest())


def _pieces(origin: BinaryIO, output: Output, read: hashlib._Hash) -> Iterator[tuple[int, torch.Tensor]]:
    info = output.source
    bits = ITEM_BITS[info.dtype]
    chunk = CHUNK_BYTES // 8 * 8
    for start in range(0, info.nbytes, chunk):
        raw = _read(origin, min(chunk, info.nbytes - start), read)
        yield start * 8 // bits, torch.frombuffer(raw, dtype=torch.uint8)


def _read(origin: BinaryIO, count: int, read: hashlib._Hash) -> bytearray:
    raw = bytearray(count)
    if origin.readinto(raw) != count:  # type: ignore[attr-defined]
        raise CheckpointError("the shard ended while it was read", where=origin.name)
    read.update(raw)
    return raw
