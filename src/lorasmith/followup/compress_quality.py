"""What a compressed model lost against its original, and the gates on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lorasmith
from lorasmith.files.atomic import write_record
from lorasmith.files.digests import sha256_file
from lorasmith.followup.compress_record import RECORD
from lorasmith.followup.compress_settings import ACCURACY_DROP
from lorasmith.models.arithmetic import resolve_device
from lorasmith.progress import Progress
from lorasmith.records.base import FileDigest, Finding, Interval
from lorasmith.records.compression import CompressRecord, TaskQuality
from lorasmith.records.proof import TokenComparison
from lorasmith.records.release import Gate, GateResult

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

    @property
    def identity(self) -> dict[str, Any]:
        """What the figures depend on, beside the two models."""
        return {
            "lorasmith": lorasmith.__version__,
            "test_set": sha256_file(self.test_set),
            "limit": self.limit,
            "tasks": self.ask is not None,
            "device": resolve_device(self.device).type,
        }


def measure(model: Path, output: Path, record: CompressRecord, how: Measuring) -> CompressRecord:
    """The record with quality, task accuracy and gates, written to the folder as well.

    What was measured in the same way before is kept, and judged by the limits of now.
    """
    if record.quality is None or record.measured_with != how.identity:
        record = _measure(model, output, record, how)
    default = {} if record.tasks is None else {"accuracy_drop": ACCURACY_DROP}
    gates = judge(record, {**default, **how.limits})
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
        code=NO_TASK,
        message="task accuracy was not measured: no question of a benchmark has a verdict for both models",
        where=test_set.name,
        remedy="build the test set with `lorasmith testset build`, or give --no-tasks",
    )
