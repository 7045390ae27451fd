"""Quantize a model to a format that transformers loads again, and measure what it lost."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

import lorasmith
from lorasmith.checkpoint.model import Checkpoint, open_checkpoint
from lorasmith.data.rows import read_examples
from lorasmith.data.sources import with_local_rows
from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import StrPath, aside, publish_folder, write_record
from lorasmith.files.digests import sha256_file
from lorasmith.files.output_folder import only_one, require_own_place
from lorasmith.followup.compression.quantize import calibration_samples, collect, quantize, weight_files
from lorasmith.followup.compression.settings import (
    ACCURACY_DROP,
    RECORD,
    CompressSettings,
    files_of,
    finished,
    limits_of,
    planned_record,
    single_way,
)
from lorasmith.followup.compression.sizes import Shape, choose_group, shapes_of, written_bytes
from lorasmith.machine.resources import human_bytes, require_disk
from lorasmith.models.device import resolve_device
from lorasmith.models.load import load_model
from lorasmith.options import CompressOptions
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest, Finding, Interval
from lorasmith.records.compression import CompressRecord, TaskQuality
from lorasmith.records.proof import TokenComparison
from lorasmith.records.release import Gate, GateResult

# What a compressed model lost against its original, and the gates on it.


NO_TASK = "no-task"

_ADVICE = "give more bits (gguf:q5_k_m, gguf:q8_0), smaller groups, or --method calibrated"


class Compare(Protocol):
    """Two models on the rows of a file, loaded one after the other: over all, and by group."""

    def __call__(
        self,
        a: Path,
        b: Path,
        test_set: Path,
        *,
        work: Path,
        device: str,
        limit: int | None,
        progress: Progress,
    ) -> tuple[TokenComparison, dict[str, dict[str, TokenComparison]], FileDigest]:
        """A is the original, B the compressed model; `work` keeps what is computed."""


class Ask(Protocol):
    """The benchmarks' own questions to both models."""

    def __call__(
        self,
        model: Path,
        compressed: Path,
        test_set: Path,
        *,
        work: Path,
        device: str,
        limit: int | None,
        progress: Progress,
    ) -> TaskQuality | None:
        """None where no question has a verdict for both; `work` keeps the answers."""


@dataclass(frozen=True)
class Measuring:
    """How the quality is measured."""

    test_set: Path
    compare: Compare
    ask: Ask | None
    limit: int | None
    limits: Mapping[str, float]
    device: str
    work: Path
    progress: Progress
    code_anyway: bool = False
    """Whether code that a model wrote ran without every protection: more answers have a verdict then."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the figures depend on, beside the two models."""
        return {
            "lorasmith": lorasmith.__version__,
            "test_set": sha256_file(self.test_set),
            "limit": self.limit,
            "tasks": self.ask is not None,
            "device": resolve_device(self.device).type,
            **({"run_code_anyway": True} if self.code_anyway else {}),
        }


def measure(model: Path, output: Path, record: CompressRecord, how: Measuring) -> CompressRecord:
    """The record with quality, task accuracy and gates, written to the folder as well.

    What was measured in the same way before is kept, and judged by the limits of now.
    """
    if record.quality is None or record.measured_with != how.identity:
        record = _measure(model, output, record, how)
    default = {} if record.tasks is None else {"accuracy_drop": ACCURACY_DROP}
    gates = judge_compression(record, {**default, **how.limits})
    passed = all(gate.verdict == "pass" for gate in gates)
    record = record.model_copy(update={"gates": gates, "passed": passed})
    write_record(output / RECORD, record)
    return record


def _measure(model: Path, output: Path, record: CompressRecord, how: Measuring) -> CompressRecord:
    shared: dict[str, Any] = {
        "work": how.work,
        "device": how.device,
        "limit": how.limit,
        "progress": how.progress,
    }
    overall, groups, digest = how.compare(model, output, how.test_set, **shared)
    tasks = None if how.ask is None else how.ask(model, output, how.test_set, **shared)
    findings = [finding for finding in record.findings if finding.code != NO_TASK]
    if tasks is None and how.ask is not None:
        findings.append(_no_tasks(how.test_set))
    return record.model_copy(
        update={
            "quality": overall,
            "quality_groups": groups,
            "tasks": tasks,
            "test_set": digest,
            "measured_with": how.identity,
            "findings": findings,
        }
    )


def judge_compression(record: CompressRecord, limits: Mapping[str, float]) -> list[GateResult]:
    """The gates of `limits` (names as `limits_of` gives them) on a measured record."""
    return [_gate(name, threshold, record) for name, threshold in limits.items()]


def _gate(name: str, threshold: float, record: CompressRecord) -> GateResult:
    measured, interval = _value(name, record)
    above = name == "top1_agreement"
    gate = Gate(
        name=f"compressed {name.replace('_', ' ')}",
        metric=f"compressed.{name}",
        comparison=">=" if above else "<=",
        threshold=threshold,
        advice="take a format of fewer bits, or a smaller model" if name == "bytes" else _ADVICE,
    )
    if measured is None:
        reason = "no question of a benchmark has a verdict for both models"
        return GateResult(gate=gate, measured=None, verdict="not measured", reason=reason)
    passed = measured >= threshold if above else measured <= threshold
    return GateResult(gate=gate, measured=measured, interval=interval, verdict="pass" if passed else "fail")


def _value(name: str, record: CompressRecord) -> tuple[float | None, Interval | None]:
    quality = record.quality
    assert quality is not None  # gates are judged on a measured record
    if name == "accuracy_drop":
        if record.tasks is None:
            return None, None
        effect = record.tasks.overall
        spread = effect.interval
        turned = spread and Interval(low=-spread.high, high=-spread.low, level=spread.level)
        return -effect.delta, turned
    return {
        "bytes": float(record.bytes),
        "perplexity_ratio": quality.perplexity_ratio,
        "mean_kl": quality.kl.mean,
        "q99_kl": quality.kl.q99,
        "top1_agreement": quality.top1_agreement,
    }[name], None


def _no_tasks(test_set: Path) -> Finding:
    return Finding(
        severity="note",
        code=NO_TASK,
        message="task accuracy was not measured: no question of a benchmark has a verdict for both models",
        where=test_set.name,
        remedy="build the test set with `lorasmith testset build`, or give --no-tasks",
    )


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
    options: CompressOptions | None = None,
    work: StrPath | None = None,
    compare: Compare | None = None,
    ask: Ask | None = None,
    progress: Progress = silent,
) -> CompressRecord:
    """Quantize the model in a folder and write it to `output`, which appears when transformers has loaded it.

    The options name one way. `work` is a folder in which measuring goes on after a kill and which several
    ways share; without one it is hidden beside the output, and removed at the end.

    The test set of the options is compared on by `compare`, and its questions put by `ask`. A finished output
    of the same inputs and settings is kept, measured where it was not in the same way, and judged. Raises
    what `prepare` does, `UsageError` for an output that is not ours to write, `CheckpointError` for a result
    that does not load, `BusyError` while another compression writes to `output`, `MachineError` where
    auto-round is missing or fails.
    """
    model, output, how = Path(model), Path(output), with_local_rows(options or CompressOptions())
    require_own_place(output, RECORD, [model])
    if how.test_set is not None and compare is None:
        raise UsageError("a test set is given, but nothing that compares", remedy="give `compare` as well")
    ready = prepare_compression(open_checkpoint(model), single_way(how), how)
    wanted = planned_record(ready.source, ready.shapes, ready.chosen, ready.rows)
    with only_one(output, "compression"):
        done = finished(output, wanted)
        if done is None:
            done = _write(model, output, wanted, ready, how.device, progress)
        if how.test_set is None or compare is None:
            return done
        place = Path(work) if work is not None else output.parent / f".{output.name}.measuring"
        measuring = Measuring(
            Path(how.test_set),
            compare,
            ask,
            how.limit,
            ready.limits,
            how.device,
            place,
            progress,
            how.run_code_anyway,
        )
        record = measure(model, output, done, measuring)
        if work is None:
            shutil.rmtree(place, ignore_errors=True)
        return record


def prepare_compression(source: Checkpoint, settings: CompressSettings, options: CompressOptions) -> Prepared:
    """Everything that can be refused before an hour of work, refused; headers and rows are read, no tensor.

    Raises `UsageError` for settings that do not go together and a format that is larger than the limit,
    `DataError` for calibration rows that the test set holds.
    """
    shapes = shapes_of(source)
    chosen = _with_group(settings, shapes, source.folder)
    calibrated = chosen.method == "calibrated"
    if calibrated and options.calibration is None:
        raise UsageError("the calibrated method needs rows", remedy="give --calibration FILE.jsonl")
    rows = options.calibration if calibrated else None
    if options.test_set is not None:
        _check_rows(options.test_set, rows)
    limits = limits_of(options)
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
        findings = _sampled(len(samples), chosen, ready.rows)
        wanted = wanted.model_copy(update={"calibration_samples": len(samples), "findings": findings})
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


def _sampled(held: int, chosen: CompressSettings, rows: Path) -> list[Finding]:
    """Said where the file holds fewer samples than were asked for."""
    if held >= chosen.calibration_rows:
        return []
    return [
        Finding(
            severity="warning",
            code="few-samples",
            message=f"the rows hold {held} calibration samples of {chosen.calibration_length} tokens, "
            f"{chosen.calibration_rows} were asked for",
            where=rows.name,
            remedy="give more rows, or a smaller --calibration-length",
        )
    ]
