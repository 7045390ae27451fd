"""Quantize a model to a format that transformers loads again, and measure what it lost."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.checkpoint.model import open_checkpoint
from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import aside, publish_folder, write_record
from lorasmith.files.jsonl import read_examples
from lorasmith.files.lock import only_one
from lorasmith.files.machine import human_bytes, require_disk
from lorasmith.files.paths import StrPath
from lorasmith.followup.compress_quality import Ask, Compare, Measuring, measure
from lorasmith.followup.compress_record import RECORD, check_output, files_of, finished, planned_record
from lorasmith.followup.compress_run import calibration_samples, collect, quantize, weight_files
from lorasmith.followup.compress_settings import CompressSettings, resolve_limits
from lorasmith.followup.sizes import Shape, choose_group, shapes_of
from lorasmith.models.arithmetic import resolve_device
from lorasmith.models.load import load_model
from lorasmith.progress import Progress, silent
from lorasmith.records.compression import CompressRecord

_NO_DATA = [1, 2, 3, 4, 5, 6, 7, 8] * 4
"""Round-to-nearest looks at no data, but without some the library would fetch its own from the hub."""


def compress(
    model: StrPath,
    output: StrPath,
    *,
    settings: CompressSettings | None = None,
    calibration: StrPath | None = None,
    test_set: StrPath | None = None,
    compare: Compare | None = None,
    ask: Ask | None = None,
    limit: int | None = None,
    limits: Mapping[str, float] | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> CompressRecord:
    """Quantize the model in a folder and write it to `output`, which appears when transformers has loaded it.

    `calibration` is a JSONL file with prompts and responses, local, needed by the calibrated method;
    `test_set` is compared on by `compare` and its questions put by `ask`, with `limits` in place of some of
    `LIMITS` or beside them. A finished output of the same inputs and settings is kept, and measured. Raises
    `UsageError` for settings that do not go together and a format that is larger than the limit,
    `DataError` for calibration rows that the test set holds, `CheckpointError` for a model that cannot be
    quantized or a result that does not load, `BusyError` while another compression writes to `output`,
    `MachineError` where auto-round is missing or fails.
    """
    model, output = Path(model), Path(output)
    chosen = settings or CompressSettings()
    chosen.check()
    thresholds = resolve_limits(limits)
    source = open_checkpoint(model)
    shapes = shapes_of(source)
    chosen = _with_group(chosen, shapes, model)
    check_output(model, output)
    rows = None if calibration is None or chosen.method == "rtn" else Path(calibration)
    if chosen.method == "calibrated" and rows is None:
        raise UsageError("the calibrated method needs rows", remedy="give --calibration FILE.jsonl")
    how = None
    if test_set is not None:
        if compare is None:
            raise UsageError(
                "a test set is given, but nothing that compares", remedy="give `compare` as well"
            )
        how = Measuring(Path(test_set), compare, ask, limit, thresholds, device, progress)
        _check_rows(how.test_set, rows)
    wanted = planned_record(source, shapes, chosen, rows)
    _check_size(wanted, thresholds.get("bytes"))
    with only_one(output, "compression"):
        done = finished(output, wanted)
        if done is None:
            done = _write(model, output, wanted, chosen, rows, device, progress)
        return done if how is None else measure(model, output, done, how)


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
    return replace(chosen, group_size=group)


def _check_rows(test_set: Path, calibration: Path | None) -> None:
    """Before hours of work: the test set is one, and holds nothing of what is calibrated on."""
    held_out = {example.content for example in read_examples(test_set)}
    if calibration is None:
        return
    rows = read_examples(calibration)
    shared = [example for example in rows if example.content in held_out]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(rows)} calibration rows are in the test set, such as {shared[0].id!r}",
            where=calibration,
            expected="rows that the test set does not hold: the quality could not be measured on them",
            remedy="calibrate on the training file, or take these rows out (`lorasmith testset split`)",
        )


def _check_size(wanted: CompressRecord, most: float | None) -> None:
    if most is not None and wanted.planned_bytes > most:
        raise UsageError(
            f"{wanted.file_format} makes {human_bytes(wanted.planned_bytes)} of this model, the limit is "
            f"{human_bytes(int(most))}",
            remedy="see which formats fit: lorasmith compress --plan --target-size",
        )


def _write(
    model: Path,
    output: Path,
    wanted: CompressRecord,
    chosen: CompressSettings,
    calibration: Path | None,
    device: str,
    progress: Progress,
) -> CompressRecord:
    require_disk(output.parent, wanted.planned_bytes + (16 << 20), "compress the model")
    temporary = aside(output)
    shutil.rmtree(temporary, ignore_errors=True)
    samples = [_NO_DATA]
    if calibration is not None:
        samples = calibration_samples(model, calibration, chosen.calibration_rows, chosen.calibration_length)
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
        load_model(temporary)
        size = sum(file.stat().st_size for file in weight_files(temporary))
        record = wanted.model_copy(
            update={
                "bytes": size,
                "bits_per_weight": 8 * size / wanted.parameters,
                "files": files_of(temporary),
            }
        )
        write_record(temporary / RECORD, record)
        publish_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record
