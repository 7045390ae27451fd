"""One shard from disk to disk, in bounded memory, with the SHA-256 of what is read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from lorasmith.checkpoint.header import ITEM_BITS, TensorFile, build_header
from lorasmith.errors import CheckpointError
from lorasmith.merging.disk import FileReader, FileWriter, Lanes, PendingPieces
from lorasmith.merging.folder import ShardDone
from lorasmith.merging.plan import Output
from lorasmith.merging.tensors import TensorOnDisk
from lorasmith.merging.writers import TensorWriter
from lorasmith.progress import Advance
from lorasmith.records.base import FileDigest
from lorasmith.records.merging import MergedTensor

_STEP_BYTES = 8 << 20
"""How much of a replaced tensor is read at a time."""


def shard_header(outputs: Sequence[Output]) -> tuple[bytes, int]:
    """The merged shard's header, and the whole file's size."""
    header, placed = build_header(
        ((output.name, output.dtype, output.shape) for output in outputs), {"format": "pt"}
    )
    return header, placed[-1].stop if placed else len(header)


def write_shard(
    source: TensorFile,
    outputs: Sequence[Output],
    make: Callable[[Output], TensorWriter],
    adapters: Sequence[Path],
    path: Path,
    advance: Advance,
    lanes: Lanes,
    known_sha256: str | None,
) -> ShardDone:
    """Write a merged shard to `path`, synced.

    The first outputs stand for the source's tensors in the order of their data; separated heads follow.
    `make` gives a tensor's writer when its turn comes, so that only one holds its factors at a time;
    `adapters` are the files that replaced tensors are read from. The source is hashed while it is read where
    its SHA-256 is not known.
    """
    header, size = shard_header(outputs)
    places = [*source.tensors.values(), *[None] * (len(outputs) - len(source.tensors))]
    with (
        FileReader(source.path, source.size, lanes, digest=known_sha256 is None) as reader,
        PendingPieces() as pending,
        FileWriter(path, size, lanes, pending) as file,
    ):
        stream = TensorStream(reader, pending)
        stream.skip(source.data_start)
        file.append(header)
        tensors: list[MergedTensor] = []
        for output, place in zip(outputs, places, strict=True):
            writer = make(output)
            if place is output.source:
                pieces = stream.pieces(place.nbytes, ITEM_BITS[place.dtype])
            else:
                # W is not what stands here in the base's file: that is passed over, W read on its own.
                stream.skip(place.nbytes if place is not None else 0)
                holder = source.path if output.adapter is None else adapters[output.adapter]
                pieces = _pieces_of(TensorOnDisk(holder, output.source))
            for first, raw in pieces:
                _write_piece(writer, output, raw, first, file, advance, pending)
            pending.add(partial(_note, writer, tensors))
        if not stream.at_end():
            raise CheckpointError("the shard changed while it was read", where=source.path)
        merged = FileDigest(path=source.path.name, bytes=size, sha256=file.finish())
        return ShardDone(file=merged, source_sha256=known_sha256 or reader.finish(), tensors=tensors)


def _write_piece(
    writer: TensorWriter,
    output: Output,
    raw: torch.Tensor,
    first: int,
    file: FileWriter,
    advance: Advance,
    pending: PendingPieces,
) -> None:
    """Let a writer put its result straight into the file's buffers, cut where these end."""
    stored_bits, bits = ITEM_BITS[output.source.dtype], ITEM_BITS[output.dtype]
    count = len(raw) * 8 // stored_bits
    done = 0
    while done < count:
        space = file.space()
        fitting = min(count - done, len(space) * 8 // bits)
        start = done * stored_bits // 8
        # An element that begins in one buffer and ends in the next is made aside and copied.
        straddling = fitting == 0
        elements = 1 if straddling else fitting
        piece = raw[start : start + (elements * stored_bits + 7) // 8]
        length = (elements * bits + 7) // 8
        direct = None if straddling else _view(space[:length], bits)
        if direct is None:
            target = torch.empty(length, dtype=torch.uint8)
            writer.piece(piece, first + done, target)()
            file.append(target.numpy().data)
        else:
            pending.add(writer.piece(piece, first + done, direct))
            file.filled(length)
        advance(length)
        done += elements


def _note(writer: TensorWriter, tensors: list[MergedTensor]) -> None:
    """Keep the record of a tensor whose pieces are all made."""
    result = writer.result()
    if result is not None:
        tensors.append(result)


def _view(space: memoryview, bits: int) -> torch.Tensor | None:
    """Memory as a tensor of bytes; None where numbers of `bits` would not lie at their own multiples."""
    view = torch.frombuffer(space, dtype=torch.uint8)
    return view if view.data_ptr() % max(1, bits // 8) == 0 else None


class TensorStream:
    """A reader's chunks as one run of bytes, given out in whole numbers of a tensor."""

    def __init__(self, reader: FileReader, pending: PendingPieces) -> None:
        self._chunks = reader.chunks()
        self._path = reader.path
        self._rest = memoryview(b"")
        self._pending = pending
        self._begun = 0
        """How many pieces were when the chunk in hand was asked for."""

    def _next(self) -> memoryview | None:
        """Another chunk: the one before that in hand is given up, so what is made of it must be complete."""
        self._pending.finish(self._begun)
        self._begun = self._pending.begun
        return next(self._chunks, None)

    def _more(self) -> None:
        while not len(self._rest):
            chunk = self._next()
            if chunk is None:
                raise CheckpointError("the file ended while it was read", where=self._path)
            self._rest = chunk

    def skip(self, count: int) -> None:
        """Pass over bytes; they are hashed all the same."""
        while count:
            self._more()
            part = min(count, len(self._rest))
            self._rest = self._rest[part:]
            count -= part

    def take(self, count: int) -> bytearray:
        """A few bytes, joined over the end of a chunk."""
        joined = bytearray()
        while len(joined) < count:
            self._more()
            part = min(count - len(joined), len(self._rest))
            joined += self._rest[:part]
            self._rest = self._rest[part:]
        return joined

    def pieces(self, nbytes: int, bits: int) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor's bytes with the number of each piece's first element."""
        item = max(1, bits // 8)
        done = 0
        while done < nbytes:
            self._more()
            part = min(nbytes - done, len(self._rest)) // item * item
            if part == 0:
                # The chunk ends within a number.
                raw = torch.frombuffer(self.take(item), dtype=torch.uint8)
            else:
                raw = torch.frombuffer(self._rest[:part], dtype=torch.uint8)
                self._rest = self._rest[part:]
            if raw.data_ptr() % item:
                raw = raw.clone()
            yield done * 8 // bits, raw
            done += len(raw)

    def at_end(self) -> bool:
        """Whether every byte has been given out."""
        return not len(self._rest) and self._next() is None


def _pieces_of(stored: TensorOnDisk) -> Iterator[tuple[int, torch.Tensor]]:
    step = _STEP_BYTES * 8 // ITEM_BITS[stored.info.dtype]
    for first in range(0, stored.info.elements, step):
        values = stored.read(first, min(step, stored.info.elements - first))
        yield first, values.view(torch.uint8)
