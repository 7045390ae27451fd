"""The records of a run as they lie on disk; an absent one is None, a damaged one is an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lorasmith.errors import DataError
from lorasmith.files.atomic import read_record
from lorasmith.records.base import Finding, Record
from lorasmith.records.compression import CompressRecord
from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics
from lorasmith.records.followup import (
    DraftRecord,
    RespondRecord,
    RespondTiming,
    SpeculationRecord,
    SpeculationTiming,
)
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, ComparisonRecord, WeightProof
from lorasmith.records.release import GateRecord, RunRecord, TimingRecord
from lorasmith.records.scoring import TaskResult, ValidationResult

# The records of the steps after the release, as far as a run has them.


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class FollowupRecords:
    """What was made of the merged model; None for a step that was not asked for."""

    responses: RespondRecord | None = None
    responses_speed: RespondTiming | None = None
    draft: DraftRecord | None = None
    speculation: SpeculationRecord | None = None
    speculation_speed: SpeculationTiming | None = None
    """Speeds are None where timings are not shown, too."""
    compressed: tuple[CompressRecord, ...] = ()
    """From the largest to the smallest."""

    def __bool__(self) -> bool:
        return any((self.responses, self.draft, self.speculation, self.compressed))

    def findings(self) -> dict[str, list[Finding]]:
        """Name of a step → what there is to know of it."""
        named = {
            "responses": self.responses,
            "draft model": self.draft,
            "speculative decoding": self.speculation,
            **{f"{record.kind}, {record.method}": record for record in self.compressed},
        }
        return {name: record.findings for name, record in named.items() if record is not None}


def load_followup(run: Path, *, timings: bool) -> FollowupRecords:
    """Read what is there. Raises `InputError` for a damaged record."""
    folder = run / "followup"
    compressed = [
        read_record(path, CompressRecord) for path in folder.glob("compressed/*/lorasmith_compress.json")
    ]
    return FollowupRecords(
        responses=_read(folder / "responses" / "responses.json", RespondRecord),
        responses_speed=_read(folder / "responses.timing.json", RespondTiming) if timings else None,
        draft=_read(folder / "draft" / "lorasmith_draft.json", DraftRecord),
        speculation=_read(folder / "speculation.json", SpeculationRecord),
        speculation_speed=_read(folder / "speculation.timing.json", SpeculationTiming) if timings else None,
        compressed=tuple(sorted(compressed, key=lambda record: (-record.bytes, record.kind, record.method))),
    )


def _read(path: Path, kind: type[R]) -> R | None:
    return read_record(path, kind) if path.is_file() else None


ROLES = ("base", "adapter", "merged")


@dataclass(frozen=True)
class RunRecords:
    """What the page is made of; None where a stage did not run."""

    folder: Path
    run: RunRecord | None
    statistics: DatasetStatistics | None
    contamination: ContaminationRecord | None
    validations: dict[str, ValidationResult]
    """Role → result, in the order of `ROLES`."""
    merge: MergeRecord | None
    weights: WeightProof | None
    behaviour: BehaviourProof | None
    comparison: ComparisonRecord | None
    gates: GateRecord | None
    """Those on cost come last, and only where timings are shown."""
    timing: TimingRecord | None
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    """Role → answers to the benchmarks' own questions, in the order of `ROLES`."""
    followup: FollowupRecords = field(default_factory=FollowupRecords)

    def findings(self) -> list[tuple[list[str], Finding]]:
        """All findings with the names of the records they stand in, each once, errors first."""
        sources: dict[str, list[Finding]] = {
            **{f"{role} validation": result.findings for role, result in self.validations.items()},
            **{f"{role} answers": result.findings for role, result in self.tasks.items()},
        }
        named = {
            "test set": self.statistics,
            "merge": self.merge,
            "proof of the weights": self.weights,
            "proof of the behaviour": self.behaviour,
        }
        for name, record in named.items():
            if record is not None:
                sources[name] = record.findings
        sources |= self.followup.findings()
        ranks = {"error": 0, "warning": 1}
        found: dict[str, tuple[list[str], Finding]] = {}
        for name, findings in sources.items():
            for finding in findings:
                found.setdefault(finding.model_dump_json(), ([], finding))[0].append(name)
        return sorted(found.values(), key=lambda pair: ranks.get(pair[1].severity, 2))


def load_run(run: Path, *, timings: bool) -> RunRecords:
    """Read every record that is there. Raises `DataError` where none is, `InputError` for a damaged one."""
    validations = {role: _read(run / "validation" / f"{role}.json", ValidationResult) for role in ROLES}
    answered = {role: _read(run / "validation" / f"{role}_tasks.json", TaskResult) for role in ROLES}
    records = RunRecords(
        folder=run,
        run=_read(run / "run.json", RunRecord),
        statistics=_read(run / "testset" / "statistics.json", DatasetStatistics),
        contamination=_read(run / "testset" / "contamination.json", ContaminationRecord),
        validations={role: result for role, result in validations.items() if result is not None},
        merge=_read(run / "merged" / "lorasmith_merge.json", MergeRecord),
        weights=_read(run / "proof" / "weights.json", WeightProof),
        behaviour=_read(run / "proof" / "behaviour.json", BehaviourProof),
        comparison=_read(run / "proof" / "comparison.json", ComparisonRecord),
        gates=_gates(run, timings=timings),
        timing=_read(run / "timing.json", TimingRecord) if timings else None,
        tasks={role: result for role, result in answered.items() if result is not None},
        followup=load_followup(run, timings=timings),
    )
    if records.run is None and not records.validations and records.merge is None:
        raise DataError(
            "there is no record of a run here",
            where=run,
            expected="a run folder, or validation_results of an unpacked package",
            remedy="give the folder that holds run.json",
        )
    return records


def _gates(run: Path, *, timings: bool) -> GateRecord | None:
    found = _read(run / "gates.json", GateRecord)
    costs = _read(run / "cost_gates.json", GateRecord) if timings else None
    if found is None or costs is None:
        return found or costs
    return GateRecord(passed=found.passed and costs.passed, gates=[*found.gates, *costs.gates])
