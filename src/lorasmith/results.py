"""What a run found: all its records, read back from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import lorasmith
from lorasmith.config import RunConfig
from lorasmith.errors import ExitCode
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import digest_path
from lorasmith.gates import Measured
from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, ComparisonRecord, WeightProof
from lorasmith.records.release import GateRecord, PackageManifest, RunRecord
from lorasmith.records.scoring import ValidationResult

_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pyarrow", "isal")
"""Their versions may decide the bytes of a run."""


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

    @property
    def exit_code(self) -> ExitCode:
        """1 when a gate did not pass, the weights are not the merge, or the test set is contaminated."""
        no = (
            not self.gates.passed
            or self.weights.grade == "different"
            or self.contamination.verdict == "contaminated"
        )
        return ExitCode.ANSWER_IS_NO if no else ExitCode.OK


def load_result(run: Path) -> RunResult:
    """The records of a finished run; raises `InputError` naming the first that is missing or wrong."""
    measured = load_measured(run)
    return RunResult(
        folder=run,
        statistics=read_record(run / "testset" / "statistics.json", DatasetStatistics),
        comparison=read_record(run / "proof" / "comparison.json", ComparisonRecord),
        gates=read_record(run / "gates.json", GateRecord),
        package=read_record(run / "package" / "manifest.json", PackageManifest),
        **vars(measured),
    )


def load_measured(run: Path) -> Measured:
    """The records that the gates read."""
    return Measured(
        base=read_record(run / "validation" / "base.json", ValidationResult),
        adapter=read_record(run / "validation" / "adapter.json", ValidationResult),
        merged=read_record(run / "validation" / "merged.json", ValidationResult),
        merge=read_record(run / "merged" / "lorasmith_merge.json", MergeRecord),
        weights=read_record(run / "proof" / "weights.json", WeightProof),
        behaviour=read_record(run / "proof" / "behaviour.json", BehaviourProof),
        contamination=read_record(run / "testset" / "contamination.json", ContaminationRecord),
    )


def describe_run(config: RunConfig, *, rehash: bool = False) -> RunRecord:
    """`run.json`: the options without their paths, the libraries, the digests of the inputs."""
    inputs = {"base": config.base, "adapter": config.adapter, "test_set": config.test_set}
    inputs |= {f"train {number}": path for number, path in enumerate(config.train, 1)}
    options = config.model_dump(mode="json", exclude={"base", "adapter", "test_set", "train", "output"})
    return RunRecord(
        config={**options, "gates": [gate.model_dump(mode="json") for gate in config.resolved_gates()]},
        versions={"lorasmith": lorasmith.__version__, **{name: version(name) for name in _LIBRARIES}},
        inputs={name: digest_path(path, rehash=rehash) for name, path in inputs.items()},
    )
