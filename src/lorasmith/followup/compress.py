"""Quantize a model to a format that transformers loads again, and measure what it lost."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.checkpoint.model import Checkpoint, open_checkpoint
from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import aside, publish_folder, write_record
from lorasmith.files.jsonl import read_examples
from lorasmith.files.lock import only_one
from lorasmith.files.machine import human_bytes, require_disk
from lorasmith.files.paths import StrPath
from lorasmith.files.place import require_own_place
from lorasmith.followup.compress_quality import Ask, Compare, Measuring, measure
from lorasmith.followup.compress_record import RECORD, files_of, finished, planned_record
from lorasmith.followup.compress_run import calibration_samples, collect, quantize, weight_files
from lorasmith.followup.compress_settings import CompressOptions, CompressSettings, resolve_limits
from lorasmith.followup.sizes import Shape, choose_group, shapes_of
from lorasmith.followup.sizes_plan import written_bytes
from lorasmith.models.arithmetic import resolve_device
from lorasmith.models.load import load_model
from lorasmith.progress import Progress, silent
from lorasmith.records.base import Finding
from lorasmith.records.compression import CompressRecord

_NO_DATA = [1, 2, 3, 4, 5, 6, 7, 8] * 4
"""Round-to-nearest looks at no data, but without some the library would fetch its own from the hub."""


@dataclass(frozen=True)
class Prepared:
    """A way to compress a model that its files and the options allow."""

    source: Checkpoint
    shapes: list[Shape]
    chosen: CompressSettings
    """With the group size that is taken."""
    rows: Path | None
    """That calibrate."""
    limits: dict[str, float]


def compress(
    model: StrPath,
    output: StrPath,
    *,
    settings: CompressSettings | None = None,
    options: CompressOptions | None = None,
    compare: Compare | None = None,
    ask: Ask | None = None,
    progress: Progress = silent,
) -> CompressRecord:
    """Quantize the model in a folder and write it to `output`, which appears when transformers has loaded it.

    The test set of the options is compared on by `compare`, and its questions put by `ask`. A finished output
    of the same inputs and settings is kept, measured where it was not in the same way, and judged. Raises
    what `prepare` does, `UsageError` for an output that is not ours to write, `CheckpointError` for a result
    that does not load, `BusyError` while another compression writes to `output`, `MachineError` where
    auto-round is missing or fails.
    """
    model, output, how = Path(model), Path(output), options or CompressOptions()
    require_own_place(output, RECORD, [model])
    if how.test_set is not None and compare is None:
        raise UsageError("a test set is given, but nothing that compares", remedy="give `compare` as well")
    ready = prepare(model, settings or CompressSettings(), how)
    wanted = planned_record(ready.source, ready.shapes, ready.chosen, ready.rows)
    with only_one(output, "compression"):
        done = finished(output, wanted)
        if done is None:
            done = _write(model, output, wanted, ready, how.device, progress)
        if how.test_set is None or compare is None:
            return done
        work = Path(how.work) if how.work is not None else output.parent / f".{output.name}.measuring"
        measuring = Measuring(
            Path(how.test_set), compare, ask, how.limit, ready.limits, how.device, work, progress
        )
        record = measure(model, output, done, measuring)
        if how.work is None:
            shutil.rmtree(work, ignore_errors=True)
        return record


def prepare(model: Path, settings: CompressSettings, options: CompressOptions) -> Prepared:
    """Everything that can be refused before an hour of work, refused; headers and rows are read, no tensor.

    Raises `UsageError` for settings that do not go together and a format that is larger than the limit,
    `CheckpointError` for a model that cannot be quantized, `DataError` for calibration rows that the test set
    holds.
    """
    settings.check()
    options.check()
    source = open_checkpoint(model)
    shapes = shapes_of(source)
    chosen = _with_group(settings, shapes, model)
    calibrated = chosen.method == "calibrated"
    if calibrated and options.calibration is None:
        raise UsageError("the calibrated method needs rows", remedy="give --calibration FILE.jsonl")
    rows = Path(options.calibration) if calibrated and options.calibration is not None else None
    if options.test_set is not None:
        _check_rows(Path(options.test_set), rows)
    limits = resolve_limits(options.limits)
    size = written_bytes(shapes, source.tied, chosen.format, chosen.bits, chosen.group_size or 32)
    if size > limits.get("bytes", size):
        raise UsageError(
            f"{chosen.format} makes {human_bytes(size)} of this model, the limit is "
            f"{human_bytes(int(limits['bytes']))}",
            remedy="see which formats fit: lorasmith compress --plan --target-size",
        )
    return Prepared(source, shapes, chosen, rows, limits)


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


def _write(
    model: Path,
    output: Path,
    wanted: CompressRecord,
    ready: Prepared,
    device: str,
    progress: Progress,
) -> CompressRecord:
    require_disk(output.parent, wanted.planned_bytes + (16 << 20), "compress the model")
    temporary = aside(output)
    shutil.rmtree(temporary, ignore_errors=True)
    chosen, samples = ready.chosen, [_NO_DATA]
    if ready.rows is not None:
        samples = calibration_samples(model, ready.rows, chosen.calibration_rows, chosen.calibration_length)
        found = _sampled(len(samples), chosen, ready.rows)
        wanted = wanted.model_copy(update={"calibration_samples": len(samples), "findings": found})
    job: dict[str, Any] = {
        **asdict(chosen),
        "model": str(model.resolve()),
        "format": "llm_compressor" if chosen.format == "compressed-tensors" else chosen.format,
        "samples": samples,
        "device": str(resolve_device(device)),
        "threads": torch.get_num_threads(),
    }
    try:
        blocks = 1 + max((shape.layer or 0 for shape in ready.shapes), default=0)
        result = quantize(job, temporary, blocks, progress)
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


def _sampled(found: int, chosen: CompressSettings, rows: Path) -> list[Finding]:
    """Said where the file holds fewer samples than were asked for."""
    if found >= chosen.calibration_rows:
        return []
    return [
        Finding(
            severity="warning",
            code="few-samples",
            message=f"the rows hold {found} calibration samples of {chosen.calibration_length} tokens, "
            f"{chosen.calibration_rows} were asked for",
            where=rows.name,
            remedy="give more rows, or a smaller --calibration-length",
        )
    ]
