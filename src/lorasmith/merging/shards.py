"""The shards of a merge, one after the other here or several at a time on a cluster: one loop for both.

Every merged element is the correctly rounded value of its formula, or a draw from a stream that its tensor's
name and its place fix; so neither hardware nor order shows in the bytes, and a cluster's are those of one
machine. Its workers write into the partial folder, on storage that all machines see.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from glob import escape
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import torch

from lorasmith.checkpoint.adapter import Adapter, open_adapter
from lorasmith.checkpoint.model import Checkpoint, open_checkpoint
from lorasmith.errors import (
    AdapterError,
    CheckpointError,
    MemoryLimitError,
    RemoteError,
    os_errors,
)
from lorasmith.executors.base import Executor, Unsplittable, WorkSpec
from lorasmith.files.digests import digest_folder
from lorasmith.files.journal import Rows
from lorasmith.merging.disk import Lanes
from lorasmith.merging.folder import PartialFolder, ShardDone
from lorasmith.merging.numbers.threads import Workers
from lorasmith.merging.plan import Plan, plan_merge
from lorasmith.merging.stream import write_shard
from lorasmith.merging.tensors import Factors
from lorasmith.merging.writers import Calibrated, make_writer
from lorasmith.models.device import is_out_of_memory, release_memory
from lorasmith.models.hidden_states import require_same_files
from lorasmith.progress import Advance, Progress
from lorasmith.records.base import Record
from lorasmith.records.scoring import Conditions

_SEEN_SECONDS = 90.0
"""How long a file of another machine may take to be seen: NFS looks anew after a minute at most."""


def merge_shards(
    merger: ShardMerger, job: MergeJob, partial_folder: PartialFolder, executor: Executor, progress: Progress
) -> tuple[list[ShardDone], bool]:
    """Have the shards written that are not there yet; and whether all went past the page cache.

    Workers elsewhere make their own merger from `job` and hash what they read, which has to be the base that
    is known here. Raises `CheckpointError` where it is not, `RemoteError` where a shard that was written
    cannot be seen from here.
    """
    shards = merger.base.shards
    sizes = [sum(output.nbytes for output in merger.plan.shards[shard.path.name]) for shard in shards]
    finished = [partial_folder.done(shard.path.name) for shard in shards]
    # The largest first, so that no worker is left with it at the end.
    missing = sorted((n for n, done in enumerate(finished) if done is None), key=lambda n: (-sizes[n], n))
    direct = True
    with progress("Merge", total=sum(sizes), unit="B") as advance, executor:
        advance(sum(size for size, done in zip(sizes, finished, strict=True) if done is not None))
        work = ShardWork(merger, _not_seen if executor.remote else advance)
        with closing(work):
            spec = WorkSpec(open_merging, {"job": job})
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


def _not_seen(count: int) -> None:
    """Progress within a shard, which is only seen where the shard is made here."""


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
    calibrated: Calibrated | None = None
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
        target = self.folder / f".{name}.{uuid4().hex}.partial"
        make = partial(
            make_writer,
            factors=self.factors,
            base=shard,
            workers=workers,
            dither_seed=self.dither_seed,
            calibrated=self.calibrated,
        )
        adapter_files = [adapter.file.path for adapter in self.adapters]
        with os_errors(self.folder, "write"):
            for left in self.folder.glob(f".{escape(name)}.*.partial"):
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
            target.replace(self.folder / name)
        return done


# Shards as an executor's work: each chunk is the number of one shard.


class ShardMade(Record):
    """What a worker sends back."""

    FORMAT: ClassVar[str] = "lorasmith/merge-shard-made/1"

    done: ShardDone
    direct: bool
    """Whether it went past the page cache."""


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
        """Of no account: neither processor nor versions show in the bytes."""
        return Conditions(device="cpu", processor="any", threads=torch.get_num_threads())


# A worker's side: the same merger, made from what can be sent.


@dataclass(frozen=True)
class MergeJob:
    """What a worker needs to merge any shard as the command itself would."""

    base: str
    adapters: tuple[str, ...]
    adapter_sha256: tuple[str, ...]
    weights: tuple[float, ...]
    precision: str
    dither_seed: int | None
    folder: str
    """The partial folder."""
    key: str
    """The partial folder's key: a worker that finds another one there does not share the storage."""
    files: str
    """A digest of the names and sizes in the base."""


@contextmanager
def open_merging(job: MergeJob) -> Iterator[ShardWork]:
    """Open the inputs in another process and make sure that they are the command's."""
    try:
        shared = (Path(job.folder) / ".merge" / "key").read_text() == job.key
    except OSError:
        shared = False
    if not shared:
        raise CheckpointError(
            "a worker does not see the folder that is merged into",
            where=job.folder,
            expected="an output on storage that all machines see under the same path",
        )
    require_same_files(job.files, job.base, None)
    folders = [Path(folder) for folder in job.adapters]
    adapters = [open_adapter(folder) for folder in folders]
    if tuple(digest_folder(folder) for folder in folders) != job.adapter_sha256:
        raise AdapterError(
            "a worker finds another adapter under this path than the command",
            where=", ".join(job.adapters),
            expected="one storage that all machines see under the same path",
        )
    base = open_checkpoint(Path(job.base))
    plan = plan_merge(base, adapters, job.weights, job.precision)
    merger = ShardMerger(Path(job.folder), base, adapters, plan, job.dither_seed)
    with closing(ShardWork(merger, _not_seen, torch.get_num_threads())) as work:
        yield work
