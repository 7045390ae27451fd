"""What a compressed model lost against its original, and the gates on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorasmith.files.atomic import write_record
from lorasmith.followup.compress_record import RECORD
from lorasmith.followup.compress_settings import ACCURACY_DROP
from lorasmith.models.arithmetic import resolve_device
from lorasmith.models.load import LoadedModel, load_model
from lorasmith.progress import Progress
from lorasmith.records.base import FileDigest, Finding, Interval
from lorasmith.records.compression import CompressRecord, TaskQuality
from lorasmith.records.proof import TokenComparison
from lorasmith.records.release import Gate, GateResult

_ADVICE = "give more bits (gguf:q5_k_m, gguf:q8_0), smaller groups, or --method calibrated"


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


class Ask(Protocol):
    """The benchmarks' own questions to both models."""

    def __call__(
        self,
        model: Path,
        compressed: Path,
        test_set: Path,
        *,
        device: str,
        limit: int | None,
        progress: Progress,
    ) -> TaskQuality | None:
        """None where no question has a verdict for both."""


@dataclass(frozen=True)
class Measuring:
    """How the quality is measured."""

    test_set: Path
    compare: Compare
    ask: Ask | None
    limit: int | None
    limits: Mapping[str, float]
    device: str
    progress: Progress


def measure(model: Path, output: Path, record: CompressRecord, how: Measuring) -> CompressRecord:
    """The record with quality, task accuracy and gates, written to the folder as well."""
    place = resolve_device(how.device)
    overall, groups, digest = how.compare(
        lambda: load_model(model, device=place),
        lambda: load_model(output, device=place),
        how.test_set,
        device=how.device,
        limit=how.limit,
        progress=how.progress,
    )
    tasks = None
    if how.ask is not None:
        tasks = how.ask(
            model, output, how.test_set, device=how.device, limit=how.limit, progress=how.progress
        )
    record = record.model_copy(
        update={
            "quality": overall,
            "quality_groups": groups,
            "tasks": tasks,
            "test_set": digest,
            "findings": [] if tasks or how.ask is None else [_no_tasks(how.test_set)],
        }
    )
    default = {} if tasks is None else {"accuracy_drop": ACCURACY_DROP}
    gates = judge(record, {**default, **how.limits})
    passed = all(gate.verdict == "pass" for gate in gates)
    record = record.model_copy(update={"gates": gates, "passed": passed})
    write_record(output / RECORD, record)
    return record


def judge(record: CompressRecord, limits: Mapping[str, float]) -> list[GateResult]:
    """The gates of `limits` (names as in `compress_settings.LIMITS`) on a measured record."""
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
    found = record.quality
    assert found is not None  # gates are judged on a measured record
    if name == "accuracy_drop":
        if record.tasks is None:
            return None, None
        effect = record.tasks.overall
        spread = effect.interval
        turned = spread and Interval(low=-spread.high, high=-spread.low, level=spread.level)
        return -effect.delta, turned
    return {
        "bytes": float(record.bytes),
        "perplexity_ratio": found.perplexity_ratio,
        "mean_kl": found.kl.mean,
        "q99_kl": found.kl.q99,
        "top1_agreement": found.top1_agreement,
    }[name], None


def _no_tasks(test_set: Path) -> Finding:
    return Finding(
        severity="note",
        code="no-task",
        message="task accuracy was not measured: no question of a benchmark has a verdict for both models",
        where=test_set.name,
        remedy="build the test set with `lorasmith testset build`, or give --no-tasks",
    )
