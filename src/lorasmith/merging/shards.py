"""Shards merged one after the other in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial as partial_function

from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.merging.disk import Lanes
from lorasmith.merging.folder import PartialFolder, ShardDone
from lorasmith.merging.modes import Mode
from lorasmith.merging.plan import Plan
from lorasmith.merging.recipes import make_recipe
from lorasmith.merging.stream import write_shard
from lorasmith.merging.tensors import Factors
from lorasmith.merging.workers import Workers
from lorasmith.progress import Progress


def write_shards(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    plan: Plan,
    partial: PartialFolder,
    known: Mapping[str, str],
    mode: Mode,
    progress: Progress,
) -> tuple[list[ShardDone], bool]:
    """Write the shards that are not there yet; and whether all went past the page cache."""
    factors = Factors(adapters)
    files = [adapter.file.path for adapter in adapters]
    total = sum(output.nbytes for output in plan.outputs)
    finished = []
    lanes = Lanes()
    with progress("Merge", total=total, unit="B") as advance, closing(lanes), Workers() as workers:
        for shard in base.shards:
            name = shard.path.name
            outputs = plan.shards[name]
            done = partial.done(name)
            if done is None:
                make = partial_function(
                    make_recipe,
                    factors=factors,
                    base=shard,
                    workers=workers,
                    dither_seed=mode.dither_seed,
                    calibrated=mode.calibrated,
                )
                target = partial.path / name
                written = write_shard(shard, outputs, make, files, target, advance, lanes, name not in known)
                done = ShardDone(
                    file=written.file,
                    source_sha256=written.source_sha256 or known[name],
                    tensors=written.tensors,
                )
                partial.finish_shard(name, done)
            else:
                advance(sum(output.nbytes for output in outputs))
            finished.append(done)
    return finished, lanes.direct
