"""Merge adapters into a base, shard by shard, into a folder that needs neither of them any more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial as partial_function
from os import PathLike
from pathlib import Path

from lorasmith import __version__
from lorasmith.checkpoint.adapter import Adapter, open_adapter
from lorasmith.checkpoint.header import dump_object
from lorasmith.checkpoint.model import INDEX, Checkpoint, open_checkpoint
from lorasmith.errors import CheckpointError, UsageError, os_errors
from lorasmith.executors.base import Executor
from lorasmith.files.atomic import StrPath, write_record
from lorasmith.files.digests import (
    combine,
    describe,
    digest_folder,
    folder_files,
    known_sha256,
    remember_sha256,
)
from lorasmith.files.output_folder import only_one
from lorasmith.hub.cache import Origin, origin_of
from lorasmith.hub.models import local_model
from lorasmith.machine.resources import require_disk
from lorasmith.merging.calibrated.rows import TOKENS
from lorasmith.merging.cluster import MergeJob, refuse_calibrated, write_elsewhere
from lorasmith.merging.disk import Lanes
from lorasmith.merging.folder import (
    PartialFolder,
    ShardDone,
    check_copies,
    check_place,
    companions,
    identity_of,
    make_key,
    merged_config,
    merged_index,
)
from lorasmith.merging.modes import ROUNDINGS, Mode, choose_mode
from lorasmith.merging.numbers.threads import Workers
from lorasmith.merging.plan import PRECISIONS, Plan, plan_merge
from lorasmith.merging.recipes import make_writer
from lorasmith.merging.stream import shard_header, write_shard
from lorasmith.merging.tensors import Factors
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.merging import MergeRecord

# Shards merged one after the other in this process.


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
                    make_writer,
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


# `lorasmith_merge.json`: what a merge was made from, and what became of the updates in all.


NO_OP_FRACTION = 0.5
"""From this share of swallowed updates on a merge is called close to a no-op."""


def make_record(
    plan: Plan,
    shards: Sequence[ShardDone],
    *,
    files: list[FileDigest],
    origin: Origin | None,
    base_sha256: str,
    adapter_sha256: list[str],
    weights: list[float],
    precision: str,
    mode: Mode,
) -> MergeRecord:
    """Counts over all tensors, and a warning where the merge is close to a no-op."""
    tensors = [tensor for done in shards for tensor in done.tensors]
    swallowed = sum(tensor.swallowed for tensor in tensors)
    updated = swallowed + sum(tensor.changed for tensor in tensors)
    fraction = swallowed / updated if updated else 0.0
    untouched = [output for output in plan.outputs if output.change is None]
    findings = [*plan.findings, *mode.findings]
    if not updated:
        findings.append(
            Finding(
                severity="warning",
                code="no-op",
                message="the adapter changes nothing: all its updates are zero",
            )
        )
    elif fraction >= NO_OP_FRACTION and mode.rounding == "nearest":
        findings.append(
            Finding(
                severity="warning",
                code="close-to-no-op",
                message=f"rounding swallowed {fraction:.1%} of the updates: they are below half an ulp",
                remedy="merge with --rounding calibrated or dithered, or --precision float16, to keep them",
            )
        )
    return MergeRecord(
        lorasmith_version=__version__,
        base_repository=origin.repository if origin else None,
        base_commit=origin.commit if origin else None,
        base_sha256=base_sha256,
        adapter_sha256=adapter_sha256,
        adapter_weights=weights,
        precision=precision,
        rounding=mode.rounding,
        seed=mode.dither_seed,
        calibration=None if mode.rows is None else mode.rows.use,
        tensors=tensors,
        copied=sum(output.dtype == output.source.dtype for output in untouched),
        cast=sum(output.dtype != output.source.dtype for output in untouched),
        elements_updated=updated,
        elements_swallowed=swallowed,
        swallowed_fraction=fraction,
        untied=plan.untied,
        files=sorted(files, key=lambda file: file.path),
        findings=findings,
    )


RECORD = "lorasmith_merge.json"
REVISION = 2
"""Raised whenever the merged bytes of the same inputs change, so that no older partial folder is taken up."""


def merge(
    base: StrPath,
    adapter: StrPath | Sequence[StrPath],
    output: StrPath,
    *,
    weights: Sequence[float] | None = None,
    precision: str = "base",
    rounding: str = "nearest",
    seed: int = 0,
    calibration: StrPath | Sequence[StrPath] | None = None,
    calibration_tokens: int = TOKENS,
    test_set: StrPath | None = None,
    template: str = "auto",
    device: str = "auto",
    executor: Executor | None = None,
    progress: Progress = silent,
) -> MergeRecord:
    """Write to `output` a standalone model: each changed element is W + Σ w·s·B·A, rounded once.

    `weights` gives w per adapter (1 each by default), `precision` the type of the merged floats (`base` keeps
    each tensor's own). The folder appears as a whole; a merge that was killed goes on where it stood when
    the same call is made again, and ends with the same bytes.

    `rounding` is `nearest` (each element correctly rounded, no `seed` needed), `dithered` (unbiased: up or
    down with the probability that makes the mean right, from a fixed stream of `seed`; see dither.py) or
    `calibrated` (fitted to what the layers get from `calibration_tokens` of the rows of `calibration`, drawn
    by `seed`; see calibrate.py). Rows of `test_set` are refused there; `template` and `device` are as in
    `validate`. `auto` is calibrated where rows are given, without those of the test set, and else nearest.
    What is copied, cast or replaced as a whole is always rounded to nearest.

    `executor` on a cluster merges several shards at a time, on storage that all its machines see, with the
    same bytes; a calibrated merge is refused there (`UsageError`).

    Raises `UsageError` for impossible arguments or an output inside an input, `CheckpointError` and
    `AdapterError` for inputs that cannot be merged rightly, `DiskError` before anything is written where the
    space will not do, and `BusyError` while another merge writes to the same output.
    """
    folders = [Path(adapter)] if isinstance(adapter, str | PathLike) else [Path(item) for item in adapter]
    factors = _check_arguments(folders, weights, precision, rounding)
    base, output = local_model(base, folders, progress=progress), Path(output)
    check_place(output, [base, *folders])
    checkpoint = open_checkpoint(base)
    adapters = [open_adapter(folder) for folder in folders]
    plan = plan_merge(checkpoint, adapters, factors, precision)
    mode = choose_mode(
        rounding,
        plan,
        base,
        folders,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        test_set=test_set,
        template=template,
        seed=seed,
        device=device,
    )
    elsewhere = executor is not None and executor.remote
    if elsewhere:
        refuse_calibrated(mode)
    with only_one(output, "merge"):
        adapter_digests = [digest_folder(folder) for folder in folders]
        base_files = folder_files(base)
        identity = identity_of(base_files)
        key = make_key(
            {
                "version": __version__,
                "revision": REVISION,
                "base": identity,
                "adapters": adapter_digests,
                "weights": [weight.hex() for weight in factors],
                "precision": precision,
                "rounding": mode.key,
            }
        )
        check_copies(plan.copies, checkpoint, adapters)
        partial = PartialFolder(output, key)
        _require_space(plan, partial, output)
        hashed = {shard.path.name: known_sha256(shard.path) for shard in checkpoint.shards}
        hashed_before = {name: sha256 for name, sha256 in hashed.items() if sha256 is not None}
        mode.fit(checkpoint, adapters, plan, partial.scratch, progress)
        if executor is not None and elsewhere:
            job = MergeJob.of(base, folders, adapter_digests, factors, precision, mode, partial, key)
            shards, direct = write_elsewhere(
                job, checkpoint, plan, partial, hashed_before, executor, progress
            )
        else:
            shards, direct = write_shards(checkpoint, adapters, plan, partial, hashed_before, mode, progress)
        if identity_of(base_files) != identity:
            raise CheckpointError(
                "the base changed during the merge",
                where=base,
                remedy="merge again when nothing writes to it",
            )
        known = {}
        for shard, done in zip(checkpoint.shards, shards, strict=True):
            known[shard.path.name] = done.source_sha256
            remember_sha256(shard.path, done.source_sha256)
        small = _write_small_files(checkpoint, folders, plan, precision, partial)
        record = make_record(
            plan,
            shards,
            files=[done.file for done in shards] + small,
            origin=origin_of(base),
            base_sha256=_base_digest(base, base_files, known),
            adapter_sha256=adapter_digests,
            weights=factors,
            precision=precision,
            mode=mode,
        )
        write_record(partial.path / RECORD, record)
        partial.publish([file.path for file in record.files] + [RECORD])
    return record.model_copy(update={"direct_io": direct})


def _check_arguments(
    folders: Sequence[Path], weights: Sequence[float] | None, precision: str, rounding: str
) -> list[float]:
    if not folders:
        raise UsageError("no adapter is given", expected="one or more adapter folders")
    if precision not in PRECISIONS:
        raise UsageError(f"the precision is {precision!r}", expected="one of " + ", ".join(PRECISIONS))
    if rounding not in ROUNDINGS:
        raise UsageError(f"the rounding is {rounding!r}", expected="one of " + ", ".join(ROUNDINGS))
    factors = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(folders):
        raise UsageError(
            f"{len(folders)} adapters are given {len(factors)} weights", expected="one weight each"
        )
    for weight in factors:
        # Beyond this the proof of the error bound would have to deal with overflow.
        if not math.isfinite(weight) or not 2.0**-64 <= abs(weight) <= 2.0**64:
            raise UsageError(f"a weight is {weight}", expected="a finite number that is not 0")
    return factors


def _require_space(plan: Plan, partial: PartialFolder, output: Path) -> None:
    needed = sum(
        shard_header(outputs)[1] for name, outputs in plan.shards.items() if partial.done(name) is None
    )
    require_disk(output.parent, needed + (64 << 20), "write the merged model")


def _write_small_files(
    base: Checkpoint, adapters: list[Path], plan: Plan, precision: str, partial: PartialFolder
) -> list[FileDigest]:
    config = merged_config(base.config, precision, untied=plan.untied, vocabulary=plan.vocabulary)
    contents = {"config.json": dump_object(config)}
    index = merged_index(base, plan)
    if index is not None:
        contents[INDEX] = index
    for name, file in companions(base.folder, adapters).items():
        with os_errors(file, "read"):
            contents[name] = file.read_bytes()
    for name, content in contents.items():
        partial.write(name, content)
    return describe([partial.path / name for name in sorted(contents)], partial.path, rehash=True)


def _base_digest(base: Path, files: Sequence[Path], known: dict[str, str]) -> str:
    """The base folder's digest, with the shards' as they were found while they were read."""
    others = [file for file in files if file.relative_to(base).as_posix() not in known]
    digests = [
        FileDigest(path=name, bytes=(base / name).stat().st_size, sha256=sha256)
        for name, sha256 in known.items()
    ]
    return combine([*describe(others, base), *digests])
