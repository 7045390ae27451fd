"""The shards of a merge, one after the other here or several at a time on a cluster: one loop for both.

A shard goes from disk to disk in bounded memory, and what is read and written is hashed on the way. Every
merged element is the correctly rounded value of its formula, or a draw from a stream that its tensor's name
and its place fix; so neither hardware nor order shows in the bytes, and a cluster's are those of one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from glob import escape
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import torch

from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.header import ITEM_BITS, TensorFile, build_header
from lorasmith.checkpoint.model import Checkpoint, Decoded
from lorasmith.errors import CheckpointError, MemoryLimitError, RemoteError, os_errors
from lorasmith.executors.base import Executor, Unsplittable, WorkSpec
from lorasmith.files.inputs import open_input
from lorasmith.files.journal import Rows
from lorasmith.merging.disk import FileReader, FileWriter, Lanes, PendingPieces
from lorasmith.merging.folder import PartialFolder, ShardDone
from lorasmith.merging.numbers.dither import ThresholdStream
from lorasmith.merging.numbers.threads import Workers
from lorasmith.merging.onto_grid import CalibratedGridWriter, GridWriter
from lorasmith.merging.plan import Output, Plan
from lorasmith.merging.tensors import Factors, TensorOnDisk
from lorasmith.merging.writers import CalibratedTensors, TensorWriter, make_writer
from lorasmith.models.device import is_out_of_memory, release_memory
from lorasmith.progress import Advance, Progress
from lorasmith.records.base import FileDigest, Record
from lorasmith.records.merging import MergedTensor
from lorasmith.records.scoring import Conditions

_SEEN_SECONDS = 90.0
"""How long a file of another machine may take to be seen: NFS looks anew after a minute at most."""
_STEP_BYTES = 8 << 20
"""How much of a replaced or a decoded tensor is read at a time."""


def merge_shards(
    merger: ShardMerger, spec: WorkSpec, partial_folder: PartialFolder, executor: Executor, progress: Progress
) -> tuple[list[ShardDone], bool]:
    """Have the shards written that are not there yet; and whether all went past the page cache.

    Workers elsewhere make their own merger by `spec` and hash what they read, which has to be the base that
    is known here. Raises `CheckpointError` where it is not, `RemoteError` where a shard that was written
    cannot be seen from here.
    """
    shards = merger.base.shards
    sizes = [sum(output.nbytes for output in merger.plan.shards[shard.path.name]) for shard in shards]
    finished = [partial_folder.done(merger.plan.file_of(shard.path.name)) for shard in shards]
    # The largest first, so that no worker is left with it at the end.
    missing = sorted((n for n, done in enumerate(finished) if done is None), key=lambda n: (-sizes[n], n))
    direct = True
    with progress("Merge", total=sum(sizes), unit="B") as advance, executor:
        advance(sum(size for size, done in zip(sizes, finished, strict=True) if done is not None))
        work = ShardWork(merger, nobody_watches if executor.remote else advance)
        with closing(work):
            for (number,), made in executor.map_chunks([(n,) for n in missing], work, None, spec):
                _require_known(made.done, shards[number].path, merger.known)
                _await(partial_folder.path / made.done.file.path, made.done.file.bytes)
                # Only now: from the journal's entry on, the shard is taken as it is.
                partial_folder.finish_shard(made.done)
                finished[number] = made.done
                direct = direct and made.direct
                if executor.remote:
                    advance(sizes[number])
    return [done for done in finished if done is not None], direct


def _require_known(done: ShardDone, path: Path, known: Mapping[str, str]) -> None:
    if known.get(path.name, done.source_sha256) != done.source_sha256:
        raise CheckpointError(
            "a worker read another shard than the one that was read here before",
            where=path,
            expected="one storage that all machines see under the same path",
        )


def _await(path: Path, size: int) -> None:
    until = time.monotonic() + _SEEN_SECONDS
    while not (path.exists() and path.stat().st_size == size):
        if time.monotonic() > until:
            raise RemoteError(
                "a shard that a worker has written is not seen here",
                where=path,
                expected="an output on storage that all machines see under the same path",
            )
        time.sleep(0.2)


# Shards as an executor's work: each chunk is the number of one shard.


class ShardMade(Record):
    """What a worker sends back."""

    FORMAT: ClassVar[str] = "lorasmith/merge-shard-made/1"

    done: ShardDone
    direct: bool
    """True where the shard was read and written past the page cache."""


class ShardWork(Unsplittable):
    """Threads and buffers for shard after shard, made with the first one: a cluster's driver needs none."""

    def __init__(self, merger: ShardMerger, advance: Advance, threads: int | None = None) -> None:
        self._merger = merger
        self._advance = advance
        self._threads = threads
        self._tools: tuple[Lanes, Workers] | None = None
        self._stack = ExitStack()

    def run(self, rows: Rows) -> ShardMade:
        """Merge one shard, by its number."""
        if self._tools is None:
            lanes = self._stack.enter_context(closing(Lanes()))
            self._tools = lanes, self._stack.enter_context(Workers(self._threads))
        lanes, workers = self._tools
        return ShardMade(done=self._merger.merge(rows[0], lanes, workers, self._advance), direct=lanes.direct)

    def close(self) -> None:
        """End the threads."""
        self._stack.close()

    def pack(self, result: ShardMade) -> bytes:
        """The result as JSON."""
        return result.to_json()

    def unpack(self, rows: Rows, packed: bytes) -> ShardMade:
        """The result that was packed."""
        return ShardMade.from_json(packed, where="a worker's answer")

    def conditions(self) -> Conditions:
        """The same everywhere: neither processor nor versions show in the bytes."""
        return Conditions(device="cpu", processor="any", threads=torch.get_num_threads())


def nobody_watches(count: int) -> None:
    """Progress within a shard, which is only seen where the shard is made here."""


@dataclass(frozen=True)
class ShardMerger:
    """What the shards are made from, and where to."""

    folder: Path
    """The partial folder."""
    base: Checkpoint
    adapters: Sequence[Adapter]
    plan: Plan
    dither_seed: int | None
    """The seed of dithered rounding; None rounds to nearest."""
    calibrated: CalibratedTensors | None = None
    known: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the base's shards that need not be hashed again while they are read."""

    @cached_property
    def factors(self) -> Factors:
        """The adapters' tensors, of which the last few stay in memory from shard to shard."""
        return Factors(self.adapters)

    def merge(self, number: int, lanes: Lanes, workers: Workers, advance: Advance) -> ShardDone:
        """Write a shard under a name of its own, then rename it: a worker that was given up does no harm."""
        shard = self.base.shards[number]
        name = shard.path.name
        final = self.plan.file_of(name)
        target = self.folder / f".{final}.{uuid4().hex}.partial"
        plain = partial(
            make_writer,
            factors=self.factors,
            base=shard,
            workers=workers,
            dither_seed=self.dither_seed,
            calibrated=self.calibrated,
        )

        def make(output: Output) -> TensorWriter:
            if not self.plan.keeps_format or output.decoded is None:
                return plain(output)
            weight = output.decoded.info.name
            seed = self.dither_seed
            fitted = self.calibrated
            if fitted is not None and weight in fitted.files:
                return CalibratedGridWriter(output, self.factors, workers, fitted)
            stream = None if seed is None else ThresholdStream(seed, weight)
            fallback = "" if fitted is None else fitted.fallbacks.get(weight, "")
            return GridWriter(output, self.factors, workers, stream, fallback)

        adapter_files = [adapter.file.path for adapter in self.adapters]
        with os_errors(self.folder, "write"):
            for left in self.folder.glob(f".{escape(final)}.*.partial"):
                left.unlink(missing_ok=True)
        try:
            done = write_shard(
                shard,
                self.plan.shards[name],
                make,
                adapter_files,
                target,
                advance,
                lanes,
                self.known.get(name),
                self.plan.keeps_format,
            )
        except Exception as error:
            target.unlink(missing_ok=True)
            if not is_out_of_memory(error):
                raise
            release_memory()
            raise MemoryLimitError(
                "there is too little memory to merge a shard", where=name, remedy="use a larger machine"
            ) from error
        with os_errors(self.folder, "write"):
            target.replace(self.folder / final)
        return done.model_copy(update={"file": done.file.model_copy(update={"path": final})})


# One shard: its tensors in the order of the base's file, each in pieces as they come from the disk.


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
    keeps_format: bool = False,
) -> ShardDone:
    """Write a merged shard to `path`, synced.

    The first outputs stand for the source's tensors in the order of their data; separated heads follow. What
    the base stores quantized is decoded from its parts, wherever they stand, and not from the stream.
    `make` gives a tensor's writer when its turn comes, so that only one holds its factors at a time;
    `adapters` are the files that replaced tensors are read from. The source is hashed while it is read where
    its SHA-256 is not known.
    """
    header, size = shard_header(outputs)
    if keeps_format:
        header, size = _own_header(source), source.size
    with (
        FileReader(source.path, source.size, lanes, digest=known_sha256 is None) as reader,
        PendingPieces() as pending,
        FileWriter(path, size, lanes, pending) as file,
    ):
        stream = TensorStream(reader, pending)
        stream.skip(source.data_start)
        file.append(header)
        tensors: list[MergedTensor] = []
        for output in outputs:
            writer = make(output)
            place = output.source
            if isinstance(writer, GridWriter):
                pieces = writer.pieces()
            elif output.decoded is not None:
                pieces = _decoded_pieces(output.decoded)
            elif output.adapter is None and place.start >= stream.position:
                # What no output is made from, such as a tensor that the adapter replaces, is passed over.
                stream.skip(place.start - stream.position)
                pieces = stream.pieces(place.nbytes, ITEM_BITS[place.dtype])
            else:
                holder = source.path if output.adapter is None else adapters[output.adapter]
                pieces = _pieces_of(TensorOnDisk(holder, place))
            for first, raw in pieces:
                _write_piece(writer, output, raw, first, file, advance, pending)
            pending.add(partial(_note, writer, tensors))
        stream.skip(source.size - stream.position)
        if not stream.at_end():
            raise CheckpointError("the shard changed while it was read", where=source.path)
        merged = FileDigest(path=source.path.name, bytes=size, sha256=file.finish())
        return ShardDone(file=merged, source_sha256=known_sha256 or reader.finish(), tensors=tensors)


def _own_header(source: TensorFile) -> bytes:
    """The base's header as it is, metadata and spaces included."""
    with os_errors(source.path, "read"), open_input(source.path) as handle:
        return handle.read(source.data_start)


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
        self.position = 0
        """The number of bytes that have been given out or passed over."""
        self._begun = 0
        """The number of pieces begun when the chunk in hand was asked for."""

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
            self.position += part
            count -= part

    def take(self, count: int) -> bytearray:
        """A few bytes, joined over the end of a chunk."""
        joined = bytearray()
        while len(joined) < count:
            self._more()
            part = min(count - len(joined), len(self._rest))
            joined += self._rest[:part]
            self._rest = self._rest[part:]
            self.position += part
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
                self.position += part
            if raw.data_ptr() % item:
                raw = raw.clone()
            yield done * 8 // bits, raw
            done += len(raw)

    def at_end(self) -> bool:
        """Whether every byte has been given out."""
        return not len(self._rest) and self._next() is None


def _decoded_pieces(weight: Decoded) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(1, _STEP_BYTES // (8 * weight.width))
    rows = weight.info.elements // weight.width
    for start in range(0, rows, step):
        values = weight.rows(start, min(start + step, rows))
        yield start * weight.width, values.reshape(-1).view(torch.uint8)


def _pieces_of(stored: TensorOnDisk) -> Iterator[tuple[int, torch.Tensor]]:
    step = _STEP_BYTES * 8 // ITEM_BITS[stored.info.dtype]
    for first in range(0, stored.info.elements, step):
        values = stored.read(first, min(step, stored.info.elements - first))
        yield first, values.view(torch.uint8)
