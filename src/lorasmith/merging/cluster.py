"""Shards merged by the workers of a cluster, several at a time, on storage that all machines see.

Every merged element is the correctly rounded value of its formula, or a draw from a stream that its tensor's
name and its place fix; so neither hardware nor order shows in the bytes, and they are those of one machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial as partial_function
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
    UsageError,
    os_errors,
)
from lorasmith.executors.base import Executor, Unsplittable, WorkSpec
from lorasmith.files.digests import digest_folder
from lorasmith.files.journal import Rows
from lorasmith.merging.disk import Lanes
from lorasmith.merging.folder import PartialFolder, ShardDone
from lorasmith.merging.modes import Mode
from lorasmith.merging.numbers.threads import Workers
from lorasmith.merging.plan import Plan, plan_merge
from lorasmith.merging.recipes import make_writer
from lorasmith.merging.stream import write_shard
from lorasmith.merging.tensors import Factors
from lorasmith.models.device import is_out_of_memory, release_memory
from lorasmith.models.hidden_states import files_digest, require_same_files
from lorasmith.progress import Progress
from lorasmith.records.base import Record
from lorasmith.records.scoring import Conditions

# A worker's part of a merge: any shard of it, into the folder that all machines see.


class ShardMade(Record):
    """What a worker sends back."""

    FORMAT: ClassVar[str] = "lorasmith/merge-shard-made/1"

    done: ShardDone
    direct: bool
    """Whether it went past the page cache."""


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
    """Of that folder: a worker that finds another one there does not share the storage."""
    files: str
    """Names and sizes in the base."""

    @classmethod
    def of(
        cls,
        base: Path,
        adapters: Sequence[Path],
        adapter_sha256: Sequence[str],
        weights: Sequence[float],
        precision: str,
        mode: Mode,
        partial: PartialFolder,
        key: str,
    ) -> MergeJob:
        """Of the merge that is asked for here."""
        return cls(
            base=str(base.absolute()),
            adapters=tuple(str(folder.absolute()) for folder in adapters),
            adapter_sha256=tuple(adapter_sha256),
            weights=tuple(weights),
            precision=precision,
            dither_seed=mode.dither_seed,
            folder=str(partial.path.absolute()),
            key=key,
            files=files_digest([base]),
        )


class Merger:
    """Base, adapters and plan, ready for any shard."""

    def __init__(
        self, job: MergeJob, base: Checkpoint, adapters: Sequence[Adapter], workers: Workers, lanes: Lanes
    ) -> None:
        self.job, self.base, self.workers, self.lanes = job, base, workers, lanes
        self.plan = plan_merge(base, adapters, job.weights, job.precision)
        self.factors = Factors(adapters)
        self.files = [adapter.file.path for adapter in adapters]

    def merge(self, number: int) -> ShardMade:
        """Write a shard under a name of its own, then rename it: a worker that was given up does no harm."""
        shard = self.base.shards[number]
        folder, name = Path(self.job.folder), shard.path.name
        target = folder / f".{name}.{uuid4().hex}.partial"
        make = partial_function(
            make_writer,
            factors=self.factors,
            base=shard,
            workers=self.workers,
            dither_seed=self.job.dither_seed,
        )
        with os_errors(folder, "write"):
            for left in folder.glob(f".{name}.*.partial"):
                left.unlink(missing_ok=True)
        try:
            written = write_shard(
                shard, self.plan.shards[name], make, self.files, target, lambda count: None, self.lanes, True
            )
        except Exception as error:
            target.unlink(missing_ok=True)
            if not is_out_of_memory(error):
                raise
            release_memory()
            raise MemoryLimitError(
                "a worker has too little memory to merge a shard", where=name, remedy="use larger machines"
            ) from error
        with os_errors(folder, "write"):
            target.replace(folder / name)
        done = ShardDone(
            file=written.file.model_copy(update={"path": name}),
            source_sha256=str(written.source_sha256),
            tensors=written.tensors,
        )
        return ShardMade(done=done, direct=self.lanes.direct)


class Merging(Unsplittable):
    """Shards as work: a worker merges them, the driver takes note."""

    def __init__(self, merger: Merger | None = None) -> None:
        self.merger = merger

    def run(self, rows: Rows) -> ShardMade:
        """One shard, by its number."""
        assert self.merger is not None, "the driver merges nothing"
        return self.merger.merge(rows[0])

    def pack(self, result: ShardMade) -> bytes:
        """As JSON."""
        return result.to_json()

    def unpack(self, rows: Rows, packed: bytes) -> ShardMade:
        """Back from `pack`."""
        return ShardMade.from_json(packed, where="a worker's answer")

    def conditions(self) -> Conditions:
        """Of no account: neither processor nor versions show in the bytes."""
        return Conditions(device="cpu", processor="any", threads=torch.get_num_threads())


@contextmanager
def open_merging(job: MergeJob) -> Iterator[Merging]:
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
    with closing(Lanes()) as lanes, Workers(torch.get_num_threads()) as workers:
        yield Merging(Merger(job, base, adapters, workers, lanes))


_SEEN_SECONDS = 90.0
"""How long a file of another machine may take to be seen: NFS looks anew after a minute at most."""


def refuse_calibrated(mode: Mode) -> None:
    """`UsageError` for a rounding that is fitted to rows, layer after layer, in one process."""
    if mode.rows is not None:
        raise UsageError(
            "a calibrated merge runs in one process: each layer's fit needs what the merged layers before it "
            "give",
            expected="--rounding nearest or dithered on a cluster",
            remedy="leave --executor ray out, or give another rounding",
        )


def write_elsewhere(
    job: MergeJob,
    base: Checkpoint,
    plan: Plan,
    partial: PartialFolder,
    known: Mapping[str, str],
    executor: Executor,
    progress: Progress,
) -> tuple[list[ShardDone], bool]:
    """Have the shards written that are not there yet; and whether all went past the page cache.

    Every worker hashes what it reads, and what it reads has to be the base that is known here. Raises
    `CheckpointError` where it is not, `RemoteError` where a written shard cannot be seen from here.
    """
    sizes = [sum(output.nbytes for output in plan.shards[shard.path.name]) for shard in base.shards]
    finished = [partial.done(shard.path.name) for shard in base.shards]
    missing = sorted((n for n, done in enumerate(finished) if done is None), key=lambda n: (-sizes[n], n))
    direct = True
    spec = WorkSpec(open_merging, {"job": job})
    with progress("Merge", total=sum(sizes), unit="B") as advance, executor:
        advance(sum(size for size, done in zip(sizes, finished, strict=True) if done is not None))
        for (number,), made in executor.map_chunks([(n,) for n in missing], Merging(), None, spec):
            name = base.shards[number].path.name
            if known.get(name, made.done.source_sha256) != made.done.source_sha256:
                raise CheckpointError(
                    "a worker read another shard than the one that was read here before",
                    where=base.shards[number].path,
                    expected="one storage that all machines see under the same path",
                )
            _await(partial.path / name, made.done.file.bytes)
            partial.finish_shard(name, made.done)
            finished[number] = made.done
            direct = direct and made.direct
            advance(sizes[number])
    return [done for done in finished if done is not None], direct


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
