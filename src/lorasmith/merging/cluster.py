"""A cluster's worker of a merge: told what the command was told, it makes any shard as the command would.

Workers write into the partial folder, on storage that all machines see under the same path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasmith.checkpoint.adapter import open_adapter
from lorasmith.errors import AdapterError, CheckpointError
from lorasmith.executors.storage import SHARED, require_same_files
from lorasmith.files.digests import digest_folder
from lorasmith.merging.into import plan_into
from lorasmith.merging.shards import ShardMerger, ShardWork, nobody_watches
from lorasmith.quantized.open import open_base


@dataclass(frozen=True)
class MergeJob:
    """What a worker needs to merge any shard as the command itself would."""

    base: str
    adapters: tuple[str, ...]
    adapter_sha256: tuple[str, ...]
    weights: tuple[float, ...]
    precision: str
    into: str
    """What a quantized base is merged into."""
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
            expected=SHARED,
        )
    planned = plan_into(open_base(Path(job.base)), adapters, job.weights, job.precision, job.into)
    merger = ShardMerger(Path(job.folder), planned.source, adapters, planned.written, job.dither_seed)
    with closing(ShardWork(merger, nobody_watches, torch.get_num_threads())) as work:
        yield work
