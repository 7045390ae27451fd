"""Quantize a model to a format that transformers loads again, and measure what it lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

import lorasmith
from lorasmith.checkpoint.model import Checkpoint, open_checkpoint
from lorasmith.errors import InputError, UsageError
from lorasmith.files.atomic import aside, publish_folder, read_record, write_record
from lorasmith.files.digests import describe, digest_folder, folder_files
from lorasmith.files.machine import require_disk
from lorasmith.files.paths import StrPath
from lorasmith.followup.compress_load import load_compressed
from lorasmith.followup.compress_run import calibration_samples, collect, quantize, weight_files
from lorasmith.followup.compress_settings import CompressSettings, resolve_limits
from lorasmith.followup.sizes import Shape, choose_group, shapes_of
from lorasmith.followup.sizes_plan import written_bytes
from lorasmith.models.arithmetic import resolve_device
from lorasmith.models.load import LoadedModel, load_model
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest
from lorasmith.records.compression import CompressRecord
from lorasmith.records.proof import TokenComparison
from lorasmith.records.release import Gate, GateResult

RECORD = "lorasmith_compress.json"
_NO_DATA = [1, 2, 3, 4, 5, 6, 7, 8] * 4
"""Round-to-nearest looks at no data, but without some the library would fetch its own from the hub."""


class Compare(Protocol):
    """Two models on the rows of a file, loaded one after the other: over all, and by group."""

    def __call__(
        self,
        load_a: Callable[[], LoadedModel],
        load_b: Callable[[], LoadedModel],
        test_set: Path,
        *,
        device: str,
        limit: int | None,
        progress: Progress,
    ) -> tuple[TokenComparison, dict[str, dict[str, TokenComparison]], FileDigest]:
        """A is the original, B the compressed model."""


def compress(
    model: StrPath,
    output: StrPath,
    *,
    settings: CompressSettings | None = None,
    calibration: StrPath | None = None,
    test_set: StrPath | None = None,
    compare: Compare | None = None,
    limit: int | None = None,
    limits: Mapping[str, float] | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> CompressRecord:
    """Quantize the model in a folder and write it to `output`, which appears when it loads and is measured.

    `calibration` is a JSONL file with prompts and responses, local, needed by the calibrated method;
    `test_set` is compared on by `compare`, with `limits` in place of some of `LIMITS`. A finished output of
    the same inputs and settings is kept, and only measured where it was not. Raises `UsageError` for settings
    that do not go together, `CheckpointError` for a model that cannot be quantized or a result that does not
    load, `MachineError` where auto-round is missing or fails.
    """
    model, output = Path(model), Path(output)
    chosen = settings or CompressSettings()
    chosen.check()
    thresholds = resolve_limits(limits)
    if test_set is not None and compare is None:
        raise UsageError("a test set is given, but nothing that compares", remedy="give `compare` as well")
    source = open_checkpoint(model)
    shapes = shapes_of(source)
    chosen = _with_group(chosen, shapes, model)
    _check_output(model, output)
    if chosen.method == "calibrated" and calibration is None:
        raise UsageError("the calibrated method needs rows", remedy="give --calibration FILE.jsonl")
    wanted = _record(source, shapes, chosen, None if calibration is None else Path(calibration))
    done = _finished(output, wanted)
    if done is None:
        done = _write(model, output, wanted, chosen, calibration, device, progress)
    if test_set is None or compare is None:
        return done
    return _measure(model, output, done, Path(test_set), compare, limit, thresholds, device, progress)


def _with_group(chosen: CompressSettings, shapes: list[Shape], model: Path) -> CompressSettings:
    """The group size that divides every width, for a format that has one to choose."""
    if chosen.format != "compressed-tensors":
        return chosen
    group = choose_group(shapes, chosen.group_size)
    widths = sorted({shape.width for shape in shapes if shape.kind == "matrix"})
    if group is None or not widths:
        raise UsageError(
            f"no group of {chosen.group_size or '128, 64 or 32'} divides the widths {widths} of this model",
            where=model,
            remedy="give another --group-size, or --format gguf:q4_0, which keeps such rows in 16 bits",
        )
    return CompressSettings(**{**asdict(chosen), "group_size": group})


def _check_output(model: Path, output: Path) -> None:
    """Never write over the model, nor over a folder that this command did not make."""
    if output.resolve() == model.resolve():
        raise UsageError("the output is the model's own folder", where=output, remedy="choose another")
    if output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file():
        raise UsageError(
            "the output holds something that `lorasmith compress` did not write",
            where=output,
            remedy="choose another folder, or remove this one",
        )


def _record(
    source: Checkpoint, shapes: list[Shape], chosen: CompressSettings, calibration: Path | None
) -> CompressRecord:
    """The record before anything is done: what identifies the output, and the plan."""
    parameters = sum(shape.elements for shape in shapes)
    used = asdict(chosen)
    if chosen.method == "rtn":
        for name in ("iterations", "calibration_rows", "calibration_length"):
            del used[name]
        calibration = None
    return CompressRecord(
        lorasmith_version=lorasmith.__version__,
        versions={name: _version(name) for name in ("auto-round", "torch", "transformers")},
        model_sha256=digest_folder(source.folder),
        file_format=chosen.format,
        method=chosen.method,
        bits=chosen.bits,
        group_size=chosen.group_size or 32,
        settings=used,
        calibration=describe([calibration], calibration.parent)[0] if calibration else None,
        parameters=parameters,
        original_bytes=sum(shard.size for shard in source.shards),
        bytes=0,
        planned_bytes=written_bytes(shapes, source.tied, chosen.format, chosen.bits, chosen.group_size or 32),
        bits_per_weight=0.0,
        files=[],
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise InputError(
            f"compression needs {name}, which is not installed", remedy="pip install 'lorasmith[compress]'"
        ) from error


def _finished(output: Path, wanted: CompressRecord) -> CompressRecord | None:
    """The record of an output made of the same inputs in the same way, whose files are as it says."""
    if not (output / RECORD).is_file():
        return None
    found = read_record(output / RECORD, CompressRecord)
    identity = ("versions", "model_sha256", "file_format", "method", "settings", "calibration")
    if any(getattr(found, name) != getattr(wanted, name) for name in identity):
        return None
    return found if _files(output) == found.files else None


def _files(folder: Path) -> list[FileDigest]:
    return describe([file for file in folder_files(folder) if file.name != RECORD], folder)


def _write(
    model: Path,
    output: Path,
    wanted: CompressRecord,
    chosen: CompressSettings,
    calibration: StrPath | None,
    device: str,
    progress: Progress,
) -> CompressRecord:
    require_disk(output.parent, wanted.planned_bytes + (16 << 20), "compress the model")
    temporary = aside(output)
    shutil.rmtree(temporary, ignore_errors=True)
    samples = [_NO_DATA]
    if chosen.method == "calibrated" and calibration is not None:
        samples = calibration_samples(
            model, Path(calibration), chosen.calibration_rows, chosen.calibration_length
        )
    job: dict[str, Any] = {
        **asdict(chosen),
        "model": str(model.resolve()),
        "format": "llm_compressor" if chosen.format == "compressed-tensors" else chosen.format,
        "samples": samples,
        "device": str(resolve_device(device)),
        "threads": torch.get_num_threads(),
    }
    try:
        result = quantize(job, temporary, progress)
        collect(result, model, temporary, f"model-{chosen.format.partition(':')[2]}")
        load_compressed(temporary)
        size = sum(file.stat().st_size for file in weight_files(temporary))
        record = wanted.model_copy(
            update={
                "bytes": size,
                "bits_per_weight": 8 * size / wanted.parameters,
                "files": _files(temporary),
            }
        )
        write_record(temporary / RECORD, record)
        publish_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _measure(
    model: Path,
    output: Path,
    record: CompressRecord,
    test_set: Path,
    compare: Compare,
    limit: int | None,
    limits: Mapping[str, float],
    device: str,
    progress: Progress,
) -> CompressRecord:
    place = resolve_device(device)
    overall, groups, digest = compare(
        lambda: load_model(model, device=place),
        lambda: load_compressed(output, device=place),
        test_set,
        device=device,
        limit=limit,
        progress=progress,
    )
    gates = [_gate(name, threshold, overall) for name, threshold in limits.items()]
    record = record.model_copy(
        update={
            "quality": overall,
            "quality_groups": groups,
            "test_set": digest,
            "gates": gates,
            "passed": all(gate.verdict == "pass" for gate in gates),
        }
    )
    write_record(output / RECORD, record)
    return record


def _gate(name: str, threshold: float, found: TokenComparison) -> GateResult:
    measured = {
        "perplexity_ratio": found.perplexity_ratio,
        "mean_kl": found.kl.mean,
        "top1_agreement": found.top1_agreement,
    }[name]
    above = name == "top1_agreement"
    passed = measured >= threshold if above else measured <= threshold
    gate = Gate(
        name=f"compressed {name.replace('_', ' ')}",
        metric=f"compressed.{name}",
        comparison=">=" if above else "<=",
        threshold=threshold,
        advice="give more bits (gguf:q5_k_m, gguf:q8_0), smaller groups, or --method calibrated",
    )
    return GateResult(gate=gate, measured=measured, verdict="pass" if passed else "fail")
