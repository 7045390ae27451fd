"""Merge adapters into a base, shard by shard, into a folder that needs neither of them any more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lorasmith import __version__
from lorasmith.checkpoint.adapter import Adapter, open_adapter
from lorasmith.checkpoint.base_match import MERGE_RECORD, require_not_merged
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import CheckpointError, UsageError
from lorasmith.executors.base import Executor, Local, WorkSpec
from lorasmith.executors.storage import files_digest
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
from lorasmith.hub.cache import origin_of
from lorasmith.hub.models import local_model
from lorasmith.machine.resources import require_disk
from lorasmith.merging.cluster import MergeJob, open_merging
from lorasmith.merging.folder import (
    PartialFolder,
    ShardDone,
    check_place,
    code_findings,
    identity_of,
    make_key,
    write_small_files,
)
from lorasmith.merging.into import choose_into, plan_into
from lorasmith.merging.modes import Mode, choose_mode
from lorasmith.merging.plan import Plan
from lorasmith.merging.shards import ShardMerger, merge_shards, shard_header
from lorasmith.merging.tensors import check_copies
from lorasmith.options import MergeOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.quantized.open import open_base
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.merging import MergeRecord

REVISION = 2
"""Raised whenever the merged bytes of the same inputs change, so that no older partial folder is taken up."""
NO_OP_FRACTION = 0.5
"""The share of swallowed updates from which on a merge is called close to a no-op."""


@documented(MergeOptions)
def merge(
    base: StrPath,
    adapter: StrPath | Sequence[StrPath],
    output: StrPath,
    *,
    weights: Sequence[float] | None = None,
    options: MergeOptions | None = None,
    executor: Executor | None = None,
    progress: Progress = silent,
    **given: Any,
) -> MergeRecord:
    """Write to `output` a standalone model: each changed element is W + Σ w·s·B·A, rounded once.

    `weights` gives w per adapter, 1 each by default. The folder appears as a whole; a merge that was killed
    goes on where it stood when the same call is made again, and ends with the same bytes.

    Rounding to `nearest` needs no `seed`. `dithered` goes up or down with the probability that makes the mean
    right, from a fixed stream (numbers/dither.py). `calibrated` is fitted to what the layers get from the
    rows of `calibration` (calibrated/fit.py), where rows of `test_set` are refused; `auto` leaves them out.
    What is copied, cast or replaced as a whole is always rounded to nearest.

    `executor` on a cluster merges several shards at a time, on storage that all its machines see, with the
    same bytes; a calibrated merge is refused there (`UsageError`).

    Raises `UsageError` for impossible arguments or an output inside an input, `CheckpointError` and
    `AdapterError` for inputs that cannot be merged rightly, `DiskError` before anything is written where the
    space will not do, and `BusyError` while another merge writes to the same output.
    """
    executor = executor or Local()
    options = MergeOptions.given(options, given)
    request = _open_request(base, adapter, output, weights, options, progress)
    planned = plan_into(request.base, request.adapters, request.weights, options.precision, request.into)
    plan = planned.written
    mode = choose_mode(options, planned.own, request.base.folder, request.folders)
    if executor.remote:
        mode.refuse_calibrated()
    with only_one(request.output, "merge"):
        inputs = _Inputs.of(request)
        require_not_merged(request.base.folder, request.folders, inputs.adapter_sha256)
        key = _key(request, inputs, mode)
        partial = PartialFolder(request.output, key)
        # A copy of a base's weight in the adapter tells a wrong base before anything is written.
        check_copies(plan.copies, request.base, request.adapters)
        _require_space(plan, partial)
        mode.fit(request.base, request.adapters, planned.own, partial.scratch, progress)
        merger = ShardMerger(
            folder=partial.path,
            base=planned.source,
            adapters=request.adapters,
            plan=plan,
            dither_seed=mode.dither_seed,
            calibrated=mode.calibrated,
            known=inputs.known,
        )
        spec = _worker_spec(request, inputs, mode, partial, key)
        shards, direct = merge_shards(merger, spec, partial, executor, progress)
        record = _publish(request, inputs, plan, mode, partial, shards)
    return record.model_copy(update={"direct_io": direct})


# The request: what is asked for, opened and checked before anything is planned.


@dataclass(frozen=True)
class _Request:
    """Inputs that can be read, an output that may be written, and how the adapters are weighted."""

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    weights: list[float]
    precision: str
    into: str
    """What a quantized base is merged into; empty for another base."""
    output: Path

    @property
    def folders(self) -> list[Path]:
        """The adapters' folders."""
        return [adapter.folder for adapter in self.adapters]


def _open_request(
    base: StrPath,
    adapter: StrPath | Sequence[StrPath],
    output: StrPath,
    weights: Sequence[float] | None,
    options: MergeOptions,
    progress: Progress,
) -> _Request:
    folders = [Path(adapter)] if isinstance(adapter, str | PathLike) else [Path(item) for item in adapter]
    checked = _check_arguments(folders, weights)
    base_folder, place = local_model(base, folders, progress=progress), Path(output)
    check_place(place, [base_folder, *folders])
    checkpoint = open_base(base_folder)
    opened = tuple(open_adapter(folder) for folder in folders)
    into = choose_into(checkpoint, opened, options.into, options.precision)
    return _Request(checkpoint, opened, checked, options.precision, into, place)


def _check_arguments(folders: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if not folders:
        raise UsageError("no adapter is given", expected="one or more adapter folders")
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


# The state of the inputs: what it is when the merge begins, and that it still is the same at the end.


@dataclass(frozen=True)
class _Inputs:
    """What tells these inputs from others."""

    base_files: list[Path]
    base_identity: list[list[Any]]
    """What `identity_of` says of each file of the base: hashing them takes as long as a merge."""
    known: dict[str, str]
    """SHA-256 of those shards of the base that were hashed before and not touched since."""
    adapter_sha256: list[str]

    @classmethod
    def of(cls, request: _Request) -> _Inputs:
        """The inputs as they are now."""
        files = folder_files(request.base.folder)
        hashed = {shard.path.name: known_sha256(shard.path) for shard in request.base.shards}
        return cls(
            base_files=files,
            base_identity=identity_of(files),
            known={name: sha256 for name, sha256 in hashed.items() if sha256 is not None},
            adapter_sha256=[digest_folder(folder) for folder in request.folders],
        )

    def require_unchanged(self, base: Path) -> None:
        """Raise `CheckpointError` where something has touched the base since."""
        if identity_of(self.base_files) != self.base_identity:
            raise CheckpointError(
                "the base changed during the merge",
                where=base,
                remedy="merge again when nothing writes to it",
            )


def _key(request: _Request, inputs: _Inputs, mode: Mode) -> str:
    """The key of the partial folder: everything that the merged bytes depend on."""
    return make_key(
        {
            "version": __version__,
            "revision": REVISION,
            "base": inputs.base_identity,
            "adapters": inputs.adapter_sha256,
            "weights": [weight.hex() for weight in request.weights],
            "precision": request.precision,
            "into": request.into,
            "rounding": mode.key,
        }
    )


def _require_space(plan: Plan, partial: PartialFolder) -> None:
    left = [outputs for name, outputs in plan.shards.items() if partial.done(plan.file_of(name)) is None]
    needed = sum(shard_header(outputs)[1] for outputs in left)
    require_disk(partial.output.parent, needed + (64 << 20), "write the merged model")


def _worker_spec(
    request: _Request, inputs: _Inputs, mode: Mode, partial: PartialFolder, key: str
) -> WorkSpec:
    """How a worker on another machine makes the same merge."""
    job = MergeJob(
        base=str(request.base.folder.absolute()),
        adapters=tuple(str(folder.absolute()) for folder in request.folders),
        adapter_sha256=tuple(inputs.adapter_sha256),
        weights=tuple(request.weights),
        precision=request.precision,
        into=request.into,
        dither_seed=mode.dither_seed,
        folder=str(partial.path.absolute()),
        key=key,
        files=files_digest([request.base.folder]),
    )
    return WorkSpec(open_merging, {"job": job})


# The end: the small files, the record, and the folder in its place.


def _publish(
    request: _Request,
    inputs: _Inputs,
    plan: Plan,
    mode: Mode,
    partial: PartialFolder,
    shards: Sequence[ShardDone],
) -> MergeRecord:
    base = request.base
    # The shards were read over minutes or hours: only now is it known that they were one state of the base.
    inputs.require_unchanged(base.folder)
    base_shards = {}
    for shard, done in zip(base.shards, shards, strict=True):
        base_shards[shard.path.name] = done.source_sha256
        remember_sha256(shard.path, done.source_sha256)
    small = write_small_files(base, request.folders, plan, request.precision, partial)
    record = _make_record(
        request,
        plan,
        mode,
        shards,
        # A file of the base that holds nothing but scales and tables has no counterpart in 16 bits.
        files=[
            done.file for shard, done in zip(base.shards, shards, strict=True) if plan.shards[shard.path.name]
        ]
        + small,
        base_sha256=_base_digest(base.folder, inputs.base_files, base_shards),
        adapter_sha256=inputs.adapter_sha256,
    )
    write_record(partial.path / MERGE_RECORD, record)
    partial.publish([file.path for file in record.files] + [MERGE_RECORD])
    return record


def _base_digest(base: Path, files: Sequence[Path], known: dict[str, str]) -> str:
    """The base folder's digest, with the shards' as they were found while they were read."""
    others = [file for file in files if file.relative_to(base).as_posix() not in known]
    digests = [
        FileDigest(path=name, bytes=(base / name).stat().st_size, sha256=sha256)
        for name, sha256 in known.items()
    ]
    return combine([*describe(others, base), *digests])


def _make_record(
    request: _Request,
    plan: Plan,
    mode: Mode,
    shards: Sequence[ShardDone],
    *,
    files: list[FileDigest],
    base_sha256: str,
    adapter_sha256: list[str],
) -> MergeRecord:
    """Counts over all tensors, and a warning where the merge is close to a no-op."""
    origin = origin_of(request.base.folder)
    tensors = [tensor for done in shards for tensor in done.tensors]
    swallowed = sum(tensor.swallowed for tensor in tensors)
    updated = swallowed + sum(tensor.changed for tensor in tensors)
    fraction = swallowed / updated if updated else 0.0
    untouched = [output for output in plan.outputs if output.change is None]
    findings = [*plan.findings, *mode.findings, *code_findings(request.base.folder)]
    if not updated:
        # B is zero until training begins: this adapter was never trained, or saved too early.
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
                message=f"rounding swallowed {fraction:.1%} of the updates: they are below half "
                + ("a step of the base's grid" if request.into == "base" else "an ulp"),
                remedy="merge with --rounding calibrated, or with --into 16bit, to keep them"
                if request.into == "base"
                else "merge with --rounding calibrated or dithered, or --precision float16, to keep them",
            )
        )
    return MergeRecord(
        lorasmith_version=__version__,
        base_repository=origin.repository if origin else None,
        base_commit=origin.commit if origin else None,
        base_sha256=base_sha256,
        adapter_sha256=adapter_sha256,
        adapter_weights=request.weights,
        precision=request.precision,
        into=request.into,
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
