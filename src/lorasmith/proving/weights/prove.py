"""The independent proof of the weights: is every stored number of a merge the right one?

It shares no code with the merge: it reads tensors through `safetensors` and the adapter's config by itself,
takes the formula from the published one, and decides rounding by intervals instead of rounding again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
from lorasmith.proving.weights.model_folder import ProvenTensor, TensorFolder, open_model
from lorasmith.proving.weights.plan import plan_proof
from lorasmith.proving.weights.quantized.decode import find_weights, put_in_place
from lorasmith.proving.weights.quantized.gguf import gguf_in, open_gguf
from lorasmith.proving.weights.quantized.keeps_format import check_all, split
from lorasmith.proving.weights.quantized.stored import Found
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
    opened = _open_base(base)
    base_folder, config, quantized = opened.folder, opened.config, opened.quantized
    merged_folder, found = _open_merged(merged, opened)
    claims = read_claims(merged)
    factors = _factors(weights, claims, len(adapters))
    loaded = [read_adapter(path, factor) for path, factor in zip(adapters, factors, strict=True)]
    plan = plan_proof(base_folder, config, loaded)
    in_model = merged_folder.tensors | {name: one.codes for name, one in found.items()}
    plan.ties.settle(in_model)
    report = Report(claims, merged_folder)
    expected, codes = split(plan, opened.stored, quantized, found) if found else (plan.expected, [])
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
    # A GGUF file needs no config beside it, and then the merge has none either.
    alone = bool(found) and not any((folder / "config.json").exists() for folder in (base, merged))
    merged_config = config if alone else read_merged_config(merged)
    report.findings += check_beside(folders, config, merged_config, right)
    report.findings += plan.findings
    if not plan.base_verified and claims.record is None:
        report.findings.append(_BASE_UNKNOWN)
    report.findings += plan.ties.check(merged_config, in_model)
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


@dataclass(frozen=True)
class _Base:
    """The base, opened."""

    folder: TensorFolder
    """Its weights by their names in the model, quantized ones as numbers."""
    config: ModelConfig
    stored: dict[str, ProvenTensor]
    """Its tensors as they are stored."""
    quantized: dict[str, Found]


def _open_base(path: Path) -> _Base:
    try:
        folder, quantized, config = _read_base(path)
    except InputError as error:
        raise CheckpointError(
            error.found, where=error.where, expected=error.expected, remedy=error.remedy
        ) from error
    if folder.problems:
        first = folder.problems[0]
        raise CheckpointError(first.message, where=first.where, expected=first.expected)
    if not quantized and config.body.get("quantization_config"):
        raise CheckpointError(
            "the base is quantized in a format that is not known here",
            where=path,
            remedy="give the 16-bit model that it was made from",
        )
    stored = dict(folder.tensors)
    put_in_place(folder, quantized, config.body)
    return _Base(folder, config, stored, quantized)


def _read_base(path: Path) -> tuple[TensorFolder, dict[str, Found], ModelConfig]:
    file = gguf_in(path)
    if file is None:
        folder, config = open_model(path), read_config(path)
        return folder, find_weights(folder.tensors, config.body), config
    gguf = open_gguf(file)
    if (path / "config.json").is_file():
        return gguf.folder, gguf.found, read_config(path)
    return gguf.folder, gguf.found, ModelConfig({"model_type": gguf.architecture}, None, "a GGUF file alone")


def _open_merged(path: Path, base: _Base) -> tuple[TensorFolder, dict[str, Found]]:
    """The merge's tensors, and its weights where it kept the quantized format of its base.

    What it holds decides what it has to be: that format, or numbers. It is read as the base is, whose
    settings its config must have too.
    """
    file = gguf_in(path) if base.quantized else None
    if file is not None:
        gguf = open_gguf(file)
        return gguf.folder, gguf.found
    folder = open_model(path, released=True)
    return folder, find_weights(folder.tensors, base.config.body) if base.quantized else {}
