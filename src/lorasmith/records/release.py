"""Records of a run as a whole: stages, gates, timings, the package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from lorasmith.records.base import FileDigest, Interval, Part, Record
from lorasmith.records.dataset import Example


class StageRecord(Record):
    """`stages/NAME.json`, written last: what the stage read, with which parameters, and what it wrote."""

    FORMAT: ClassVar[str] = "lorasmith/stage/1"

    stage: str
    version: str
    """lorasmith's version and the stage's own revision."""
    inputs: dict[str, str]
    """Name → SHA-256."""
    parameters: dict[str, Any]
    outputs: list[FileDigest]


class Gate(Part):
    """A named threshold on a measured value."""

    name: str
    metric: str
    """A key of `gates.METRICS`: `adapter.loss`, `merge.loss_delta`, `effect.loss_delta_high`, …"""
    group: str | None = None
    """`difficulty=easy`, `source=MATH`, …; all examples when absent."""
    comparison: Literal["<", "<=", ">", ">=", "==", "!="] = "<"
    threshold: float | str
    advice: str = ""
    """What to do when it fails; a verdict shows that of the metric where the gate has none."""


class GateResult(Part):
    """A gate with what was measured."""

    gate: Gate
    measured: float | str | None
    interval: Interval | None = None
    """Confidence interval of `measured`, where its record has one."""
    verdict: Literal["pass", "fail", "not measured"]
    reason: str = ""
    """Why nothing was measured."""


class GateRecord(Record):
    """`gates.json`; `cost_gates.json` for those on time, memory and money, which stay out of the package."""

    FORMAT: ClassVar[str] = "lorasmith/gates/1"

    passed: bool
    """True only when every gate passed; a gate that was not measured has not passed."""
    gates: list[GateResult]

    @classmethod
    def of(cls, results: Iterable[GateResult]) -> Self:
        """Several verdicts as one record."""
        gates = list(results)
        return cls(passed=all(result.verdict == "pass" for result in gates), gates=gates)


class StageTiming(Part):
    """What one stage cost the last time it really ran."""

    stage: str
    wall_seconds: float
    cpu_seconds: float
    """Processor time of this process, its children, and a cluster's workers."""
    peak_rss_bytes: int | None
    """Largest resident memory of this process while the stage ran; None where the system does not tell."""
    worker_peak_rss_bytes: int | None = None
    """Peak memory of a cluster's largest worker; None without one."""
    gpu_seconds: float | None = None
    """Busy time of all GPUs: their utilisation times time, sampled. None where none tells."""
    gpu_peak_bytes: int | None = None
    """Most memory in use on all GPUs, sampled."""
    gpu_joules: float | None = None
    cpu_joules: float | None = None
    """Energy of the GPUs and of the processor packages, whoever used them, on all machines that worked and
    tell it. None: not measured."""
    started: str
    """UTC, ISO 8601."""
    reused: bool = False
    """True when the last command found the stage done."""

    @property
    def joules(self) -> float | None:
        """Energy of all devices that tell; None for not measured."""
        known = [joules for joules in (self.gpu_joules, self.cpu_joules) if joules is not None]
        return sum(known) if known else None


class TimingRecord(Record):
    """`timing.json`: all that may differ between two runs with the same bytes."""

    FORMAT: ClassVar[str] = "lorasmith/timing/1"

    hardware: dict[str, Any]
    price_per_hour: float | None = None
    """Dollars per hour, where the command named a price."""
    budget: float | None = None
    """Dollars allowed, where the command named a budget."""
    unfinished_seconds: float = 0.0
    """Wall time of attempts at a stage that were stopped, interrupted or failed: paid for as well."""
    stages: list[StageTiming]


class RunRecord(Record):
    """`run.json`: what was asked, and with what."""

    FORMAT: ClassVar[str] = "lorasmith/run/1"

    config: dict[str, Any]
    versions: dict[str, str]
    inputs: dict[str, str]
    """Name → SHA-256 of folder or file."""


class PackageManifest(Record):
    """`package/manifest.json`: every file of both archives, and the archives."""

    FORMAT: ClassVar[str] = "lorasmith/package/1"

    compression: str
    archives: list[FileDigest]
    contents: dict[str, list[FileDigest]]
    """Archive name → its members."""
    stream_sha256: dict[str, str]
    """Archive name → SHA-256 of its uncompressed tar stream, equal on every machine."""
    parts: dict[str, list[FileDigest]] = {}
    """Archive name → its parts, where it was cut."""
    redacted: dict[str, str] = {}
    """Member → SHA-256 of the run's file that it was made from, where forbidden text was taken out."""


# What runs cost: by phase, in all, against plan and budget.


class PhaseCost(Part):
    """One stage of one run, as it last really ran; or what was paid for besides."""

    run: str
    """Name of the run folder."""
    phase: str
    wall_seconds: float
    cpu_seconds: float | None = None
    gpu_seconds: float | None = None
    """None where no GPU tells: then the processor was the device, or nothing is known."""
    joules: float | None = None
    """Energy of all devices that tell; None for not measured."""
    peak_rss_bytes: int | None = None
    worker_peak_rss_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    dollars: float | None
    """None where no price is known."""

    @property
    def device_seconds(self) -> float | None:
        """Time of the GPUs where they tell, else of the processors."""
        return self.cpu_seconds if self.gpu_seconds is None else self.gpu_seconds


class RentalCost(Part):
    """What one rented machine cost, from offer to end."""

    label: str
    instance: int | None
    hours: float
    compute: float
    disk: float
    traffic: float
    """US dollars; their sum is `dollars`."""
    dollars: float
    planned: float | None
    """As estimated before it was rented."""


class CostRecord(Record):
    """The answer of `lorasmith costs`."""

    FORMAT: ClassVar[str] = "lorasmith/costs/1"

    phases: list[PhaseCost]
    rentals: list[RentalCost] = []
    """Their dollars are in the phases already."""
    wall_seconds: float
    joules: float | None = None
    """Energy of all phases that were measured; None where none was."""
    dollars: float | None
    """The grand total; None unless the price of every phase is known."""
    planned: float | None
    """US dollars that were planned: as given, else as estimated before the machines were rented."""
    budget: float | None
    """US dollars that may be spent: as given, else as the runs were given."""
    within_budget: bool | None
    """None without a budget or without a total."""


# Rows whose text must not be published: they leave the machine as an id, a salted hash and scores.
#
# GPQA asks that no example appears in plain text where a crawler could find it: reports and packages obey.


REDACTED_SOURCES = frozenset({"gpqa"})
"""Names of sources, in lower case, whose rows never show their text."""

_KEPT_METADATA = ("source", "domain", "difficulty", "difficulty_from", "record_id")


class Redacted(Part):
    """What stands in place of prompt and response."""

    salt: str
    sha256: str
    """SHA-256 of salt, prompt and response, joined by NUL: who has the row can show that it is the one."""


def is_redacted(source: str) -> bool:
    """Whether rows of this source must not show their text: `GPQA-diamond`, `Idavidrein/gpqa`.

    Wherever the name stands in the source, since a row hidden for nothing costs less than one shown.
    """
    return any(hidden in source.lower() for hidden in REDACTED_SOURCES)


def salted_sha256(salt: str, prompt: str, response: str) -> str:
    """The hash that stands for a row's text."""
    return hashlib.sha256("\0".join((salt, prompt, response)).encode()).hexdigest()


def publishable_row(example: Example, salt: str) -> dict[str, Any]:
    """The row as it may leave the machine: whole, or without its text where its source forbids it."""
    if not is_redacted(example.metadata.source):
        return example.model_dump(mode="json")
    metadata = example.metadata.model_dump(mode="json")
    redacted = Redacted(salt=salt, sha256=salted_sha256(salt, example.prompt, example.response))
    return {
        "id": example.id,
        "redacted": redacted.model_dump(mode="json"),
        "metadata": {name: metadata[name] for name in _KEPT_METADATA},
    }
