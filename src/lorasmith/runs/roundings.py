"""What each rounding gives on this model and these rows, and which to take: merge, measure, remove, next."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorasmith.errors import CheckpointError, UsageError, os_errors
from lorasmith.files.atomic import StrPath, write_record
from lorasmith.merging.merge import merge
from lorasmith.models.layerwise import UnsupportedLayers
from lorasmith.options import CompareOptions, MergeOptions, ValidateOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.proving.behaviour.compare import compare
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.merging import MergeRecord, Range16, RoundingFound, RoundingsRecord
from lorasmith.records.proof import BehaviourProof
from lorasmith.scoring.validate import validate

RECORD = "roundings.json"
CLOSE = 1.25
"""A mode with a mean KL within this factor of the best is as good: the simpler one is then taken."""

_PLAIN: tuple[tuple[str, str, str], ...] = (
    ("nearest", "base", "nearest"),
    ("dithered", "base", "dithered"),
    ("calibrated", "base", "calibrated"),
    ("float16", "float16", "nearest"),
)
"""Name, precision and rounding, simplest first."""

_ACTIVATIONS = Finding(
    severity="warning",
    code="float16-activations",
    message="float16 weights are usually run in float16, whose largest number is 65,504: activations may "
    "overflow where bfloat16's would not, and this comparison, in float32, cannot see it",
    remedy="try the model in its serving engine on long prompts, or take a bfloat16 mode",
)


@documented(MergeOptions)
def compare_roundings(
    base: StrPath,
    adapter: StrPath,
    test_set: StrPath,
    output: StrPath,
    *,
    options: MergeOptions | None = None,
    limit: int | None = None,
    progress: Progress = silent,
    **given: Any,
) -> RoundingsRecord:
    """Merge in every mode, compare each result with the adapter on `test_set`, and recommend one.

    The folder `output` gets `roundings.json`; a merged model lies in it only while it is measured. Calibrated
    rounding is measured where rows are given, on `calibration_tokens` of them. Raises what `merge` and
    `compare` raise; a float16 that the model does not fit into, and a model that cannot be run layer by
    layer, are findings. With `into="base"` all modes go onto the grid of a quantized base, and each is told
    with what it keeps of the adapter's gain in loss.
    """
    asked = MergeOptions.given(options, given).model_copy(update={"test_set": Path(test_set)})
    place = Path(output)
    with os_errors(place, "write"):
        place.mkdir(parents=True, exist_ok=True)
    if any(file.name not in (RECORD, "merged", "states", "base") for file in place.iterdir()):
        raise UsageError("the folder holds other things", where=place, expected="a new folder")
    measured: list[RoundingFound] = []
    findings: list[Finding] = []
    proof: BehaviourProof | None = None
    comparing = CompareOptions.taken_from(asked, limit=limit, states=place / "states", strict=False)
    base_loss = _base_loss(base, test_set, place, comparing, progress) if asked.into == "base" else None
    # Calibrated rounding is the one that refuses rows: what is wrong with them is told at once.
    for name, precision, rounding in sorted(_PLAIN, key=lambda mode: mode[2] != "calibrated"):
        if (rounding == "calibrated" and not asked.calibration) or (asked.into == "base" != precision):
            continue
        mode: dict[str, Any] = {"precision": precision, "rounding": rounding}
        if rounding != "calibrated":
            mode |= {"calibration": (), "test_set": None}
        merged = place / "merged"
        try:
            record = merge(base, adapter, merged, options=asked.model_copy(update=mode), progress=progress)
        except UnsupportedLayers as error:
            findings.append(_not_calibrated(error.found, error.remedy or ""))
            continue
        except CheckpointError as error:
            if precision != "float16":
                raise
            findings.append(_does_not_fit(error))
            continue
        proof = compare(
            base,
            adapter,
            merged,
            test_set,
            options=comparing,
            progress=progress,
        )
        fits = float16_range(merged) if precision == "float16" else None
        measured.append(_found(name, record, proof, fits, base_loss))
        with os_errors(merged, "remove"):
            shutil.rmtree(merged)
    assert proof is not None
    shutil.rmtree(place / "states", ignore_errors=True)
    if not asked.calibration:
        remedy = "give the training file: --calibration"
        findings.append(_not_calibrated("no rows were given", remedy))
    order = [name for name, *_ in _PLAIN]
    measured.sort(key=lambda one: order.index(one.name))
    result = _judge(measured, findings, proof.test_set)
    write_record(place / RECORD, result)
    return result


def _base_loss(
    base: StrPath, test_set: StrPath, place: Path, comparing: CompareOptions, progress: Progress
) -> float:
    """The loss of the base alone, in nats per token: what the adapter's gain is counted from."""
    options = ValidateOptions.taken_from(comparing, states=None)
    found = validate(
        base, test_set, place / "base", options=options, both_boundaries=False, progress=progress
    )
    shutil.rmtree(place / "base")
    return found.overall.loss


def _found(
    name: str,
    record: MergeRecord,
    proof: BehaviourProof,
    fits: Range16 | None,
    base_loss: float | None,
) -> RoundingFound:
    overall = proof.overall
    gain = None if base_loss is None else base_loss - overall.loss_a
    return RoundingFound(
        name=name,
        precision=record.precision,
        rounding=record.rounding,
        bytes=sum(file.bytes for file in record.files),
        swallowed_fraction=record.swallowed_fraction,
        loss_delta=overall.loss_delta,
        loss_delta_interval=overall.loss_delta_interval,
        kl=overall.kl,
        top1_agreement=overall.top1_agreement,
        grade=proof.grade,
        float16=fits,
        recovery=(base_loss - overall.loss_b) / gain if base_loss is not None and gain else None,
    )


def float16_range(folder: Path) -> Range16:
    """How the weights of a float16 model lie in its range."""
    numbers = subnormal = 0
    largest = 0.0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                values = tensors.get_tensor(name)
                if values.dtype == torch.float16 and values.numel():
                    size = values.abs()
                    numbers += values.numel()
                    subnormal += int(((size > 0) & (size < torch.finfo(torch.float16).tiny)).sum())
                    largest = max(largest, float(size.max()))
    return Range16(numbers=numbers, subnormal=subnormal, largest=largest)


def _does_not_fit(error: CheckpointError) -> Finding:
    return Finding(
        severity="warning",
        code="float16-overflow",
        message=f"the model does not fit into float16: {error.found}",
        remedy="take a bfloat16 mode",
    )


def _not_calibrated(why: str, remedy: str) -> Finding:
    return Finding(
        severity="note",
        code="not-calibrated",
        message=f"calibrated rounding was not measured: {why}",
        remedy=remedy,
    )


def _judge(
    measured: Sequence[RoundingFound], findings: list[Finding], test_set: FileDigest
) -> RoundingsRecord:
    """The simplest of the modes that are about as near as the nearest; float16 only where nothing else is."""
    own = [one for one in measured if one.float16 is None]
    best = min(one.kl.mean for one in own)
    chosen = next(one for one in own if one.kl.mean <= CLOSE * best)
    plain = own[0]
    ratio = plain.kl.mean / chosen.kl.mean if chosen.kl.mean else 1.0
    reason = (
        f"{chosen.name}: mean KL {chosen.kl.mean:.1e} against {plain.kl.mean:.1e} for nearest"
        + (f", {ratio:.1f} times nearer" if chosen is not plain else "")
        + f"; loss Δ {chosen.loss_delta:+.1e}, the same next token at {chosen.top1_agreement:.2%}"
    )
    half = next((one for one in measured if one.float16 is not None), None)
    if half is not None:
        findings = [*findings, _ACTIVATIONS]
        if half.kl.mean < chosen.kl.mean:
            reason += f". float16 is nearer still ({half.kl.mean:.1e}) if it is served in a way that is safe"
    return RoundingsRecord(
        test_set=test_set, modes=list(measured), recommended=chosen.name, reason=reason, findings=findings
    )
