"""The run folder: every file that has a name, what kind of record it is, one loader for all who read it.

Results, gates, report, model card and package read a run through this module; an unpacked package has the
same layout, with fewer files. It lies below all of them: none has to import another to find a record.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

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
from lorasmith.records.release import Gate, GateRecord, GateResult, PackageManifest, RunRecord, TimingRecord
from lorasmith.records.scoring import TaskResult, ValidationResult

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class RunFile(Generic[R]):
    """A record of a run: where it lies and what it is."""

    path: str
    """Below the run folder, with forward slashes."""
    kind: type[R]

    def at(self, run: Path) -> Path:
        """The file of this run."""
        return run / self.path

    def read(self, run: Path) -> R:
        """The record; raises `InputError` where it is missing or damaged."""
        return read_record(self.at(run), self.kind)

    def read_if_there(self, run: Path) -> R | None:
        """The record, None where the file is absent; raises `InputError` where it is damaged."""
        return self.read(run) if self.at(run).is_file() else None

    def required(self, record: R | None, run: Path) -> R:
        """The record as it was loaded; where it was not there, raises what reading it raises."""
        return self.read(run) if record is None else record


ROLES = ("base", "adapter", "merged")
"""The three models of a run, in the order in which they are validated and shown."""

# Folders and files that are no records.

TEST_SET = "testset/test_set.jsonl"
"""The run's own copy."""
MERGED = "merged"
PACKAGE = "package"
STAGES = "stages"
REPORT = "report.html"
STATES = ".states"
"""Lies there while the run works: what validations leave for the comparison."""
FOLLOWUP = "followup"
"""What comes after the release."""
FOLLOWUP_WORK = ".followup"
"""What a killed step goes on from, in a folder for each set of inputs and settings."""
RESPONSE_CHUNKS = f"{FOLLOWUP}/responses.chunks.jsonl"
"""Which worker of a cluster answered what."""
COMPRESSED_MODELS = f"{FOLLOWUP}/compressed"


def scores(role: str) -> str:
    """Table of the examples' losses under a model."""
    return f"validation/{role}.parquet"


def answers(role: str) -> str:
    """Table of a model's answers to the benchmarks' questions."""
    return f"validation/{role}_tasks.parquet"


# Records, in the order in which a run writes them.

RUN = RunFile("run.json", RunRecord)
STATISTICS = RunFile("testset/statistics.json", DatasetStatistics)
CONTAMINATION = RunFile("testset/contamination.json", ContaminationRecord)
VALIDATIONS = {role: RunFile(f"validation/{role}.json", ValidationResult) for role in ROLES}
TASKS = {role: RunFile(f"validation/{role}_tasks.json", TaskResult) for role in ROLES}
MERGE = RunFile(f"{MERGED}/lorasmith_merge.json", MergeRecord)
WEIGHTS = RunFile("proof/weights.json", WeightProof)
BEHAVIOUR = RunFile("proof/behaviour.json", BehaviourProof)
COMPARISON = RunFile("proof/comparison.json", ComparisonRecord)
GATES = RunFile("gates.json", GateRecord)
RESPONSES = RunFile(f"{FOLLOWUP}/responses/responses.json", RespondRecord)
RESPONSES_SPEED = RunFile(f"{FOLLOWUP}/responses.timing.json", RespondTiming)
DRAFT = RunFile(f"{FOLLOWUP}/draft/lorasmith_draft.json", DraftRecord)
SPECULATION = RunFile(f"{FOLLOWUP}/speculation.json", SpeculationRecord)
SPECULATION_SPEED = RunFile(f"{FOLLOWUP}/speculation.timing.json", SpeculationTiming)
MANIFEST = RunFile(f"{PACKAGE}/manifest.json", PackageManifest)
TIMING = RunFile("timing.json", TimingRecord)
COST_GATES = RunFile("cost_gates.json", GateRecord)


def compressed(name: str) -> RunFile[CompressRecord]:
    """The record of one compressed model; `*` for the pattern of them all."""
    return RunFile(f"{COMPRESSED_MODELS}/{name}/lorasmith_compress.json", CompressRecord)


MEASURED: tuple[RunFile[Any], ...] = (
    *VALIDATIONS.values(), MERGE, WEIGHTS, BEHAVIOUR, COMPARISON, CONTAMINATION,
)  # fmt: skip
"""What gates and the model card are made from, whatever was asked for besides."""
PACKED: tuple[RunFile[Any], ...] = (
    RUN, STATISTICS, *MEASURED, *TASKS.values(), GATES, RESPONSES, DRAFT, SPECULATION, compressed("*"),
)  # fmt: skip
"""The evidence in a package: no times, and of the steps after the release no text of a row and no weights."""
UNTIMED = (*PACKED, MANIFEST)
ALL = (*UNTIMED, RESPONSES_SPEED, SPECULATION_SPEED, TIMING, COST_GATES)


@dataclass(frozen=True)
class FollowupRecords:
    """What was made of the merged model; None for a step that was not asked for."""

    responses: RespondRecord | None = None
    responses_speed: RespondTiming | None = None
    draft: DraftRecord | None = None
    speculation: SpeculationRecord | None = None
    speculation_speed: SpeculationTiming | None = None
    compressed: tuple[CompressRecord, ...] = ()
    """From the largest to the smallest."""

    def __bool__(self) -> bool:
        return any((self.responses, self.draft, self.speculation, self.compressed))

    def verdicts(self) -> list[GateResult]:
        """What these steps say yes or no to, as gates; the compressed models have gates of their own."""
        results = []
        if self.responses is not None:
            gate = Gate(
                name="every row is answered",
                metric="responses.failed",
                comparison="==",
                threshold=0,
                advice="see responses.failed.jsonl, and give the same command again",
            )
            results.append(_counted(gate, self.responses.failed))
        if self.speculation is not None:
            gate = Gate(
                name="speculation changes no text",
                metric="speculation.different",
                comparison="==",
                threshold=0,
                advice="do not serve this model with drafts before it is known why",
            )
            results.append(_counted(gate, sum(way.different for way in self.speculation.settings)))
        for record in self.compressed:
            for result in record.gates if record.passed is not None else []:
                name = f"{record.kind}, {record.method}: {result.gate.name}"
                results.append(
                    result.model_copy(update={"gate": result.gate.model_copy(update={"name": name})})
                )
        return results

    def findings(self) -> dict[str, list[Finding]]:
        """Name of a step → what there is to know of it."""
        named = {
            "responses": self.responses,
            "draft model": self.draft,
            "speculative decoding": self.speculation,
            **{f"{record.kind}, {record.method}": record for record in self.compressed},
        }
        return {name: record.findings for name, record in named.items() if record is not None}


def _counted(gate: Gate, count: int) -> GateResult:
    """The verdict of a gate that wants a count of nothing."""
    return GateResult(gate=gate, measured=count, verdict="fail" if count else "pass")


@dataclass(frozen=True)
class RunRecords:
    """The records of a run; None or absent where a stage did not run, or the record was not asked for."""

    folder: Path
    run: RunRecord | None = None
    statistics: DatasetStatistics | None = None
    contamination: ContaminationRecord | None = None
    validations: Mapping[str, ValidationResult] = field(default_factory=dict)
    """Role → result, in the order of `ROLES`."""
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    """Role → answers to the benchmarks' own questions, in the order of `ROLES`."""
    merge: MergeRecord | None = None
    weights: WeightProof | None = None
    behaviour: BehaviourProof | None = None
    comparison: ComparisonRecord | None = None
    gates: GateRecord | None = None
    cost_gates: GateRecord | None = None
    """Gates on time, memory and money; None where there are none."""
    package: PackageManifest | None = None
    timing: TimingRecord | None = None
    followup: FollowupRecords = field(default_factory=FollowupRecords)

    @property
    def judged(self) -> GateRecord | None:
        """All gates: of the release, of the steps after it, on cost; None where nothing was judged."""
        release, costs = (record.gates if record else [] for record in (self.gates, self.cost_gates))
        results = [*release, *self.followup.verdicts(), *costs]
        return GateRecord.of(results) if results else None

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
        where: dict[str, tuple[list[str], Finding]] = {}
        for name, findings in sources.items():
            for finding in findings:
                where.setdefault(finding.model_dump_json(), ([], finding))[0].append(name)
        return sorted(where.values(), key=lambda pair: ranks.get(pair[1].severity, 2))


def load_records(run: Path, files: Collection[RunFile[Any]] = ALL) -> RunRecords:
    """The records among `files` that lie in a run folder or an unpacked package.

    Raises `InputError` for a damaged one. While a run is still at work, give only what is needed: what an
    earlier command left of later steps may be damaged, and is about to be written anew.
    """

    def get(file: RunFile[R]) -> R | None:
        return file.read_if_there(run) if file in files else None

    validations = {role: get(file) for role, file in VALIDATIONS.items()}
    tasks = {role: get(file) for role, file in TASKS.items()}
    return RunRecords(
        folder=run,
        run=get(RUN),
        statistics=get(STATISTICS),
        contamination=get(CONTAMINATION),
        validations={role: result for role, result in validations.items() if result is not None},
        tasks={role: result for role, result in tasks.items() if result is not None},
        merge=get(MERGE),
        weights=get(WEIGHTS),
        behaviour=get(BEHAVIOUR),
        comparison=get(COMPARISON),
        gates=get(GATES),
        cost_gates=get(COST_GATES),
        package=get(MANIFEST),
        timing=get(TIMING),
        followup=FollowupRecords(
            responses=get(RESPONSES),
            responses_speed=get(RESPONSES_SPEED),
            draft=get(DRAFT),
            speculation=get(SPECULATION),
            speculation_speed=get(SPECULATION_SPEED),
            compressed=_compressed(run) if compressed("*") in files else (),
        ),
    )


def _compressed(run: Path) -> tuple[CompressRecord, ...]:
    records = [read_record(path, CompressRecord) for path in run.glob(compressed("*").path)]
    return tuple(sorted(records, key=lambda record: (-record.bytes, record.kind, record.method)))
