"""What a run found: all its records, read back from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

import lorasmith
from lorasmith.errors import ExitCode, InputError
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import digest_path
from lorasmith.gates import Measured, evaluate, join
from lorasmith.records.base import Record
from lorasmith.records.compression import CompressRecord
from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics
from lorasmith.records.followup import DraftRecord, RespondRecord, SpeculationRecord, SpeculationTiming
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, ComparisonRecord, WeightProof
from lorasmith.records.release import Gate, GateRecord, PackageManifest, RunRecord, TimingRecord
from lorasmith.records.scoring import TaskResult, ValidationResult
from lorasmith.runs.config import RunConfig, load_gates

ROLES = ("base", "adapter", "merged")

_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pyarrow", "isal")
"""Their versions may decide the bytes of a run."""


FOLLOWUP = "followup"
"""Below the run folder: what comes after the release."""
RESPONSES, DRAFT = f"{FOLLOWUP}/responses/responses.json", f"{FOLLOWUP}/draft/lorasmith_draft.json"
SPECULATION, COMPRESSED = f"{FOLLOWUP}/speculation.json", f"{FOLLOWUP}/compressed"
COMPRESS_RECORD = "lorasmith_compress.json"


@dataclass(frozen=True)
class FollowupResult:
    """What came of the follow-up steps that were asked for."""

    responses: RespondRecord | None
    draft: DraftRecord | None
    speculation: SpeculationRecord | None
    speeds: SpeculationTiming | None
    """Of speculative decoding, on this machine."""
    compressed: tuple[CompressRecord, ...]
    """From the largest to the smallest."""

    @property
    def answer_is_no(self) -> bool:
        """Whether rows failed, a text differs from greedy decoding, or a compressed model missed a gate."""
        return bool(
            (self.responses and self.responses.failed)
            or (self.speculation and any(setting.different for setting in self.speculation.settings))
            or any(record.passed is False for record in self.compressed)
        )


@dataclass(frozen=True)
class RunResult:
    """Everything a run found, as records, and where it lies."""

    folder: Path
    statistics: DatasetStatistics
    contamination: ContaminationRecord
    base: ValidationResult
    adapter: ValidationResult
    merged: ValidationResult
    merge: MergeRecord
    weights: WeightProof
    behaviour: BehaviourProof
    comparison: ComparisonRecord
    gates: GateRecord
    package: PackageManifest
    cost_gates: GateRecord | None = None
    """Gates on time, memory and money; None where there are none."""
    followup: FollowupResult | None = None
    """None where nothing was asked for after the release."""

    @property
    def judged(self) -> GateRecord:
        """All gates, those on cost last."""
        return join(self.gates, self.cost_gates)

    @property
    def exit_code(self) -> ExitCode:
        """1 when a gate did not pass, the weights are not the merge, the test set is contaminated, or a
        follow-up step says no."""
        no = (
            not self.judged.passed
            or self.weights.grade == "different"
            or self.contamination.verdict == "contaminated"
            or (self.followup is not None and self.followup.answer_is_no)
        )
        return ExitCode.ANSWER_IS_NO if no else ExitCode.OK


def load_result(run: Path) -> RunResult:
    """The records of a finished run; raises `InputError` naming the first that is missing or wrong."""
    return RunResult(
        folder=run,
        statistics=read_record(run / "testset" / "statistics.json", DatasetStatistics),
        contamination=read_record(run / "testset" / "contamination.json", ContaminationRecord),
        base=read_record(run / "validation" / "base.json", ValidationResult),
        adapter=read_record(run / "validation" / "adapter.json", ValidationResult),
        merged=read_record(run / "validation" / "merged.json", ValidationResult),
        merge=read_record(run / "merged" / "lorasmith_merge.json", MergeRecord),
        weights=read_record(run / "proof" / "weights.json", WeightProof),
        behaviour=read_record(run / "proof" / "behaviour.json", BehaviourProof),
        comparison=read_record(run / "proof" / "comparison.json", ComparisonRecord),
        gates=read_record(run / "gates.json", GateRecord),
        package=read_record(run / "package" / "manifest.json", PackageManifest),
        cost_gates=_read(run / "cost_gates.json", GateRecord),
        followup=load_followup(run),
    )


def load_followup(run: Path) -> FollowupResult | None:
    """The records of the follow-up steps, as far as they are there."""
    compressed = [
        read_record(path, CompressRecord) for path in (run / COMPRESSED).glob(f"*/{COMPRESS_RECORD}")
    ]
    found = FollowupResult(
        responses=_read(run / RESPONSES, RespondRecord),
        draft=_read(run / DRAFT, DraftRecord),
        speculation=_read(run / SPECULATION, SpeculationRecord),
        speeds=_read(run / SPECULATION.replace(".json", ".timing.json"), SpeculationTiming),
        compressed=tuple(sorted(compressed, key=lambda record: (-record.bytes, record.kind, record.method))),
    )
    return found if any((found.responses, found.draft, found.speculation, found.compressed)) else None


R = TypeVar("R", bound=Record)


def _read(path: Path, kind: type[R]) -> R | None:
    return read_record(path, kind) if path.is_file() else None


def load_measured(run: Path) -> Measured:
    """The records that gates read, as far as they are there: of a run, or of an unpacked package.

    Raises `InputError` for a record that is damaged.
    """
    validation, proof = run / "validation", run / "proof"
    tasks = {role: _read(validation / f"{role}_tasks.json", TaskResult) for role in ROLES}
    merge = _read(run / "merged" / "lorasmith_merge.json", MergeRecord)
    comparison = _read(proof / "comparison.json", ComparisonRecord)
    return Measured(
        base=_read(validation / "base.json", ValidationResult),
        adapter=_read(validation / "adapter.json", ValidationResult),
        merged=_read(validation / "merged.json", ValidationResult),
        merge=merge,
        weights=_read(proof / "weights.json", WeightProof),
        behaviour=_read(proof / "behaviour.json", BehaviourProof),
        comparison=comparison,
        contamination=_read(run / "testset" / "contamination.json", ContaminationRecord),
        tasks={role: result for role, result in tasks.items() if result is not None},
        task_effects=comparison.task_effects if comparison else {},
        timing=_read(run / "timing.json", TimingRecord),
    )


def describe_run(config: RunConfig, *, rehash: bool = False) -> RunRecord:
    """`run.json`: the options without their paths, the libraries, the digests of the inputs."""
    inputs = {"base": config.base, "adapter": config.adapter, "test_set": config.test_set}
    inputs |= {f"train {number}": path for number, path in enumerate(config.train, 1)}
    asked = config.followup
    if asked and asked.respond and asked.respond.data:
        inputs["followup data"] = asked.respond.data
    if asked and asked.draft and asked.draft.base:
        inputs["draft base"] = asked.draft.base
    left_out = {"base", "adapter", "test_set", "train", "output", "price_per_hour", "budget", "check_memory"}
    left_out |= set() if asked else {"followup"}
    left_out |= {"executor", "ray_address", "workers", "worker_threads", "worker_gpus"}
    options = config.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(left_out, True),
            **({"followup": {"respond": {"data"}, "draft": {"base"}}} if asked else {}),
        },
    )
    return RunRecord(
        config={**options, "gates": [gate.model_dump(mode="json") for gate in config.resolved_gates()]},
        versions={"lorasmith": lorasmith.__version__, **{name: version(name) for name in _LIBRARIES}},
        inputs={name: digest_path(path, rehash=rehash) for name, path in inputs.items()},
    )


# Gates judged again from the records of a run, without a model.


def judge_run(run: Path, *, config: Path | None = None, price_per_hour: float | None = None) -> GateRecord:
    """The gates of `config` (those of the run without one) on the records that lie in `run`.

    `price_per_hour` in dollars replaces the one that the run recorded. Raises `InputError` for a folder
    without `run.json`, and `UsageError` for a gate that does not exist.
    """
    record = read_record(run / "run.json", RunRecord)
    gates = load_gates(config) if config else _recorded(record, run)
    measured = load_measured(run)
    if price_per_hour is not None and measured.timing is not None:
        timing = measured.timing.model_copy(update={"price_per_hour": price_per_hour})
        measured = type(measured)(**{**vars(measured), "timing": timing})
    return evaluate(gates, measured)


def _recorded(record: RunRecord, run: Path) -> list[Gate]:
    try:
        return [Gate.model_validate(gate) for gate in record.config["gates"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise InputError(
            "the run does not name its gates",
            where=run / "run.json",
            expected="a list `gates` in its config",
            remedy="name them in a file: --config",
        ) from error
