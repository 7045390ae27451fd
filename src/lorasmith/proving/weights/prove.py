"""The independent proof of the weights: is every stored number of a merge the right one?

It shares no code with the merge: it reads tensors through `safetensors` and the adapter's config by itself,
takes the formula from the published one, and decides rounding by intervals instead of rounding again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from lorasmith.errors import CheckpointError, InputError, UsageError
from lorasmith.files import atomic, digests
from lorasmith.files.atomic import StrPath
from lorasmith.files.inputs import require_own_links
from lorasmith.files.output_folder import require_own_record
from lorasmith.hub.models import local_model
from lorasmith.progress import Progress, silent
from lorasmith.proving.weights.adapter import read_adapter
from lorasmith.proving.weights.beside import (
    Folders,
    ModelConfig,
    RightConfig,
    check_beside,
    read_config,
    read_merged_config,
)
from lorasmith.proving.weights.check import check
from lorasmith.proving.weights.claims import Claims, Identity, check_claims, read_claims
from lorasmith.proving.weights.model_folder import TensorFolder, open_model
from lorasmith.proving.weights.plan import plan_proof
from lorasmith.proving.weights.quantized.decode import decode_weights, find_weights
from lorasmith.proving.weights.quantized.keeps_format import check_all, split
from lorasmith.proving.weights.report import Report
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.proof import WeightProof

_BASE_UNKNOWN = Finding(
    severity="note",
    code="base-not-verified",
    message="nothing in adapter or merge tells which base they belong to; this proof takes the one given",
)


def prove(
    base: StrPath,
    adapter: StrPath | Sequence[StrPath],
    merged: StrPath,
    *,
    weights: Sequence[float] | None = None,
    output: StrPath | None = None,
    progress: Progress = silent,
) -> WeightProof:
    """Check every element of every tensor of `merged` and grade it `exact`, `bounded` or `different`.

    `adapter` is one PEFT adapter folder or several, `weights` their factors (all 1 by default, or as the
    merge's own record says). The record is written to the file `output` if one is given.
    Raises `AdapterError` or `CheckpointError` where base or adapter cannot be used, `InputError` where the
    merge claims a rounding that cannot be checked. What is wrong with the merge itself is graded, not raised.
    """
    if output is not None:
        require_own_record(Path(output))
    adapters = [Path(adapter)] if isinstance(adapter, str | PathLike) else [Path(one) for one in adapter]
    base, merged = local_model(base, adapters, progress=progress), Path(merged)
    require_own_links(merged)
    merged_folder = open_model(merged, released=True)
    claims = read_claims(merged)
    factors = _factors(weights, claims, len(adapters))
    base_folder, config = _open_base(base)
    stored = dict(base_folder.tensors)
    quantized = decode_weights(base_folder, config.body)
    loaded = [read_adapter(path, factor) for path, factor in zip(adapters, factors, strict=True)]
    plan = plan_proof(base_folder, config, loaded)
    plan.ties.settle(merged_folder.tensors)
    report = Report(claims, merged_folder)
    # What the merge holds decides what it has to be: the base's own format, or numbers. It is read as the
    # base is, whose settings the merge's config must have too.
    found = find_weights(merged_folder.tensors, config.body) if quantized else {}
    expected, codes = split(plan, stored, quantized, found) if found else (plan.expected, [])
    pairs = report.match(expected, {one.merged.codes.name for one in codes})
    total = sum(tensor.bytes for _, tensor in pairs) + sum(one.merged.codes.bytes for one in codes)
    with progress("Prove the weights", total=total, unit="B") as advance:
        for checked in check(pairs, advance=advance):
            report.take(checked)
        check_all(codes, report, advance)
    identity = Identity(
        base=digests.combine(_describe(base, base_folder)),
        adapters=[digests.digest_folder(path, rehash=True) for path in adapters],
        merged=_describe(merged, merged_folder),
        weights=factors,
    )
    into = "" if not quantized else "base" if found else "16bit"
    report.findings += check_claims(claims, identity, into)
    weights_read = frozenset(file.path for file in merged_folder.files)
    folders = Folders(base, adapters, merged, weights_read)
    rows_before, rows = plan.ties.rows_before, plan.ties.rows
    right = RightConfig(report.precision, base_folder.first_type, rows_before, rows, keeps_format=bool(found))
    merged_config = read_merged_config(merged)
    report.findings += check_beside(folders, config, merged_config, right)
    report.findings += plan.findings
    if not plan.base_verified and claims.record is None:
        report.findings.append(_BASE_UNKNOWN)
    report.findings += plan.ties.check(merged_config, merged_folder.tensors)
    proof = report.finish(identity, len(plan.used), sum(one.tensors for one in loaded))
    if output is not None:
        atomic.write_record(Path(output), proof)
    return proof


def _describe(folder: Path, opened: TensorFolder) -> list[FileDigest]:
    """All files of a model folder; weights with the digest of the very bytes that were checked."""
    known = {file.path: file for file in opened.files}
    described = []
    for path in digests.folder_files(folder):
        if path not in known:
            described += digests.describe([path], folder, rehash=True)
            continue
        sha256 = known[path].digest()
        digests.remember_sha256(path, sha256)
        name = path.relative_to(folder).as_posix()
        described.append(FileDigest(path=name, bytes=known[path].size, sha256=sha256))
    return described


def _factors(asked: Sequence[float] | None, claims: Claims, adapters: int) -> list[float]:
    claimed = claims.record.adapter_weights if claims.record else None
    factors = list(asked) if asked is not None else (claimed or [1.0] * adapters)
    if len(factors) != adapters:
        whose = "weights were given" if asked is not None else "adapters went into the merge, its record says"
        raise UsageError(f"{len(factors)} {whose}, but there are {adapters} adapters", expected="as many")
    if not adapters:
        raise UsageError("no adapter was given", expected="at least one")
    if not all(math.isfinite(factor) for factor in factors):
        raise UsageError(f"the weights {factors} are not all finite")
    return factors


def _open_base(path: Path) -> tuple[TensorFolder, ModelConfig]:
    try:
        folder = open_model(path)
        config = read_config(path)
    except InputError as error:
        raise CheckpointError(
            error.found, where=error.where, expected=error.expected, remedy=error.remedy
        ) from error
    if folder.problems:
        first = folder.problems[0]
        raise CheckpointError(first.message, where=first.where, expected=first.expected)
    return folder, config
