"""Shards merged by the workers of a cluster, several at a time, on storage that all machines see.

Every merged element is the correctly rounded value of its formula, or a draw from a stream that its tensor's
name and its place fix; so neither hardware nor order shows in the bytes, and they are those of one machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import CheckpointError, RemoteError, UsageError
from lorasmith.executors.base import Executor, Recipe
from lorasmith.merging.folder import PartialFolder, ShardDone
from lorasmith.merging.modes import Mode
from lorasmith.merging.plan import Plan
from lorasmith.merging.shard_worker import OPEN_MERGING, MergeJob, Merging
from lorasmith.progress import Progress

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
    recipe = Recipe(OPEN_MERGING, {"job": job})
    with progress("Merge", total=sum(sizes), unit="B") as advance, executor:
        advance(sum(size for size, done in zip(sizes, finished, strict=True) if done is not None))
        for (number,), made in executor.work_through([(n,) for n in missing], Merging(), None, recipe):
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
