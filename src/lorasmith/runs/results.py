"""What a run found: all its records, read back from its folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

import lorasmith
from lorasmith.errors import ExitCode, InputError
from lorasmith.files import run_layout as layout
from lorasmith.files.digests import digest_path
from lorasmith.files.run_layout import FollowupRecords, load_records
from lorasmith.gates import evaluate, split_costs, with_required
from lorasmith.gates.evaluate import budget_gate
from lorasmith.options import ClusterOptions, LimitOptions, MemoryOptions, RunOptions
from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, ComparisonRecord, WeightProof
from lorasmith.records.release import Gate, GateRecord, PackageManifest, RunRecord
from lorasmith.records.scoring import ValidationResult
from lorasmith.runs.config import load_gates, run_gates

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
    cost_gates: GateRecord | None = None
    """Gates on time, memory and money; None where there are none."""
    followup: FollowupRecords | None = None
    """None where nothing was asked for after the release."""

    @property
    def judged(self) -> GateRecord:
        """All gates: of the release, of the steps after it, on cost."""
        costs = self.cost_gates.gates if self.cost_gates else []
        followup = self.followup.verdicts() if self.followup else []
        return GateRecord.of([*self.gates.gates, *followup, *costs])

    @property
    def exit_code(self) -> ExitCode:
        """1 when a gate did not pass: whatever a run says no to is a gate."""
        return ExitCode.OK if self.judged.passed else ExitCode.ANSWER_IS_NO


def load_result(run: Path) -> RunResult:
    """The records of a finished run; raises `InputError` naming the first that is missing or wrong."""
    records = load_records(run)
    validations = {
        role: file.required(records.validations.get(role), run) for role, file in layout.VALIDATIONS.items()
    }
    return RunResult(
        folder=run,
        statistics=layout.STATISTICS.required(records.statistics, run),
        contamination=layout.CONTAMINATION.required(records.contamination, run),
        **validations,
        merge=layout.MERGE.required(records.merge, run),
        weights=layout.WEIGHTS.required(records.weights, run),
        behaviour=layout.BEHAVIOUR.required(records.behaviour, run),
        comparison=layout.COMPARISON.required(records.comparison, run),
        gates=layout.GATES.required(records.gates, run),
        package=layout.MANIFEST.required(records.package, run),
        cost_gates=records.cost_gates,
        followup=records.followup or None,
    )


def run_inputs(config: RunOptions) -> dict[str, Path]:
    """Everything that a run reads from outside its folder, as `run.json` names it."""
    inputs = {"base": config.base, "adapter": config.adapter, "test_set": config.test_set}
    inputs |= {f"train {number}": path for number, path in enumerate(config.train, 1)}
    if config.task_module:
        inputs["task module"] = config.task_module
    asked = config.followup
    if asked and asked.respond and asked.respond.data:
        inputs["followup data"] = asked.respond.data
    if asked and asked.draft and asked.draft.from_model:
        inputs["draft start"] = asked.draft.from_model
    return inputs


def describe_run(config: RunOptions, *, rehash: bool = False) -> RunRecord:
    """`run.json`: the options without their paths, the libraries, the digests of the inputs."""
    asked = config.followup
    left_out = {"base", "adapter", "test_set", "train", "task_module", "output"}
    left_out |= set() if asked else {"followup"}
    for unseen in (LimitOptions, MemoryOptions, ClusterOptions):  # they change nothing of what is made
        left_out |= unseen.model_fields.keys()
    options = config.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(left_out, True),
            **({"followup": {"respond": {"data"}, "draft": {"from_model"}}} if asked else {}),
        },
    )
    return RunRecord(
        config={**options, "gates": [gate.model_dump(mode="json") for gate in run_gates(config)]},
        versions={"lorasmith": lorasmith.__version__, **{name: version(name) for name in _LIBRARIES}},
        inputs={name: digest_path(path, rehash=rehash) for name, path in run_inputs(config).items()},
    )


# Gates judged again from the records of a run, without a model.


def judge_run(run: Path, *, config: Path | None = None, price_per_hour: float | None = None) -> GateRecord:
    """All gates of a run, judged again on the records in `run`; with `config` the gates of that file.

    `price_per_hour` in dollars replaces the one that the run recorded. Raises `InputError` for a folder
    without `run.json`, and `UsageError` for a gate that does not exist.
    """
    asked = layout.RUN.read(run)
    records = load_records(run, {*layout.PACKED, layout.TIMING})
    if price_per_hour is not None and records.timing is not None:
        timing = records.timing.model_copy(update={"price_per_hour": price_per_hour})
        records = replace(records, timing=timing)
    if config is not None:
        return evaluate(load_gates(config), records)
    gates = with_required(_recorded(asked, run), checked="train 1" in asked.inputs)
    if records.timing is not None and records.timing.budget is not None:
        gates.append(budget_gate(records.timing.budget))
    findings, costs = (evaluate(part, records).gates for part in split_costs(gates))
    return GateRecord.of([*findings, *records.followup.verdicts(), *costs])


def _recorded(record: RunRecord, run: Path) -> list[Gate]:
    try:
        return [Gate.model_validate(gate) for gate in record.config["gates"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise InputError(
            "the run does not name its gates",
            where=layout.RUN.at(run),
            expected="a list `gates` in its config",
            remedy="name them in a file: --config",
        ) from error
