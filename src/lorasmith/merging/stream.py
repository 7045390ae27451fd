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
    source: TensorFile,
    outputs: Sequence[Output],
    recipes: Sequence[Recipe],
    adapters: Sequence[Path],
    path: Path,
    advance: Advance,
) -> Written:
    """Write a merged shard.

    The first outputs stand for the source's tensors in the order of their data; separated heads follow.
    `adapters` are the files that replaced tensors are read from.
    """
    header, size = shard_header(outputs)
    digest = hashlib.sha256(header)
    read = hashlib.sha256()
    places = [*source.tensors.values(), *[None] * (len(outputs) - len(source.tensors))]
    with os_errors(path, "write"), path.open("wb") as sink, source.path.open("rb") as origin:
        read.update(_exactly(origin, source.data_start))
        sink.write(header)
        for output, recipe, place in zip(outputs, recipes, places, strict=True):
            if place is output.source:
                pieces = _pieces(origin, output, read)
            else:
                if place is not None:
                    _pass_over(origin, place.nbytes, read)
                pieces = _elsewhere(
                    source.path if output.adapter is None else adapters[output.adapter], output
                )
            for first, raw in pieces:
                made = recipe.piece(raw, first).numpy().data
                digest.update(made)
                sink.write(made)
                advance(len(made))
        sink.flush()
        os.fsync(sink.fileno())
        if sink.tell() != size or origin.tell() != source.size:
            raise CheckpointError("the shard changed while it was read", where=source.path)
    return Written(FileDigest(path=path.name, bytes=size, sha256=digest.hexdigest()), read.hexdigest())


def _pieces(
    origin: BinaryIO, output: Output, read: hashlib._Hash | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Whole elements of a tensor from where the file stands, with the number of the first."""
    info = output.source
    for start in range(0, info.nbytes, CHUNK_BYTES):
        raw = _exactly(origin, min(CHUNK_BYTES, info.nbytes - start))
        if read is not None:
            read.update(raw)
        yield start * 8 // ITEM_BITS[info.dtype], torch.frombuffer(raw, dtype=torch.uint8)


def _elsewhere(path: Path, output: Output) -> Iterator[tuple[int, torch.Tensor]]:
    with path.open("rb") as origin:
        origin.seek(output.source.start)
        yield from _pieces(origin, output)


def _pass_over(origin: BinaryIO, count: int, read: hashlib._Hash) -> None:
    while count:
        raw = _exactly(origin, min(CHUNK_BYTES, count))
        read.update(raw)
        count -= len(raw)


def _exactly(origin: BinaryIO, count: int) -> bytearray:
    raw = bytearray(count)
    if origin.readinto(raw) != count:  # type: ignore[attr-defined]
        raise CheckpointError("the file ended while it was read", where=origin.name)
    return raw
