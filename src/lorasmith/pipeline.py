"""The whole run, top to bottom, as a list of stages.

test set → validate base, adapter → merge → prove → validate merged → compare → gates → package, report
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lorasmith
from lorasmith.config import RunConfig, make_config
from lorasmith.errors import InputError, UsageError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.digests import CARD
from lorasmith.files.hub import hub_name, local_model, origin_of
from lorasmith.files.jsonl import read_examples, write_examples
from lorasmith.gates import evaluate, split_costs
from lorasmith.gates.evaluate import check_gates
from lorasmith.preflight.refuse import require_machine
from lorasmith.progress import Progress, Unwatched, Watcher
from lorasmith.records.base import Record
from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, ComparisonRecord, WeightProof
from lorasmith.records.release import GateRecord, PackageManifest
from lorasmith.records.scoring import TaskEffect, TaskResult, ValidationResult
from lorasmith.results import ROLES, RunResult, describe_run, load_measured, load_result
from lorasmith.stages import Stage, open_run

STATES = ".states"
"""Below the run folder while it runs: what validations leave for the comparison."""


@dataclass(frozen=True)
class Step:
    """One heading of the run: its stage, and the records that tell what came of it."""

    title: str
    stage: Stage
    shows: Mapping[str, type[Record]]
    """File below the run folder → its kind of record."""


def run(
    config: RunConfig | None = None, *, watcher: Watcher | None = None, rehash: bool = False, **options: Any
) -> RunResult:
    """Validate, merge, prove, compare, judge, report and package; stages that are done are reused.

    Give a `RunConfig`, or its fields as keywords (`base=…, adapter=…, test_set=…, output=…`).
    Raises `InputError` and `MachineError`; a failed gate is no error but stands in the result.
    """
    if config is not None and options:
        raise UsageError("both a config and single options were given", expected="one of them")
    asked = config or make_config(options)
    watch = watcher or Unwatched()
    check_places(asked)
    check_gates(asked.resolved_gates())
    base = local_model(asked.base, [asked.adapter], progress=watch.progress)
    asked = asked.model_copy(update={"base": base})
    require_machine(asked)
    if asked.budget is not None and not asked.price_per_hour:
        raise UsageError("--budget needs the price of the machine", expected="--price-per-hour, in dollars")
    with open_run(asked.output, rehash=rehash, price_per_hour=asked.price_per_hour) as folder:
        folder.budget = asked.budget
        write_record(folder.path / "run.json", describe_run(asked, rehash=rehash))
        if not asked.tasks:  # what an earlier command answered is no part of this run
            for role in ROLES:
                for name in (*_task_files(role), f"stages/tasks-{role}.json"):
                    (folder.path / name).unlink(missing_ok=True)
        steps = plan(asked, watch.progress)
        for number, step in enumerate(steps, 1):
            watch.step(number, len(steps), step.title)
            timing = folder.perform(step.stage)
            watch.finished(step.stage.name, reused=timing.reused, seconds=timing.wall_seconds)
            for name, kind in step.shows.items():
                watch.show(step.stage.name, read_record(folder.path / name, kind))
        shutil.rmtree(folder.path / STATES, ignore_errors=True)
        _judge_costs(asked, watch)
        _write_report(folder.path)
    return load_result(asked.output)


def plan(config: RunConfig, progress: Progress) -> list[Step]:
    """The steps in order. A stage names what it reads, and is done again exactly when that changes."""
    run_folder = config.output
    test_set = run_folder / "testset" / "test_set.jsonl"
    merged = run_folder / "merged"
    models = {"base": config.base, "adapter": config.adapter}
    scoring = _scoring_options(config)
    validate = partial(_validation_step, run_folder, test_set, scoring, progress)
    answer = partial(_task_steps, config, test_set, progress)
    merge_options: dict[str, Any] = {
        "precision": config.precision,
        "rounding": config.rounding,
        "seed": config.seed,
    }
    rows = merging_rows(config, test_set)
    return [
        Step(
            "Test set",
            Stage(
                name="test-set",
                inputs={"test_set": config.test_set, **_numbered("train", config.train)},
                parameters={},
                outputs=["testset"],
                action=partial(_prepare_test_set, config, progress),
            ),
            {"testset/statistics.json": DatasetStatistics, "testset/contamination.json": ContaminationRecord},
        ),
        validate("Validate base model", "base", config.base, None),
        *answer("Ask base model", "base", config.base, None),
        validate("Validate LoRA model", "adapter", config.base, config.adapter),
        *answer("Ask LoRA model", "adapter", config.base, config.adapter),
        Step(
            "Merge LoRA weights",
            Stage(
                name="merge",
                inputs={**models, **_numbered("calibration", rows.get("calibration", ())), **_held_out(rows)},
                parameters={**merge_options, "template": config.template, **_origin(config.base)},
                outputs=["merged"],
                action=lambda: lorasmith.merge(
                    config.base, config.adapter, merged, progress=progress, **merge_options, **rows
                ),
            ),
            {"merged/lorasmith_merge.json": MergeRecord},
        ),
        Step(
            "Prove the weights",
            Stage(
                name="prove-weights",
                inputs={**models, "merged": merged},
                parameters={},
                outputs=["proof/weights.json"],
                action=lambda: lorasmith.prove(
                    config.base,
                    config.adapter,
                    merged,
                    output=run_folder / "proof" / "weights.json",
                    progress=progress,
                ),
            ),
            {"proof/weights.json": WeightProof},
        ),
        validate("Validate merged model", "merged", merged, None),
        *answer("Ask merged model", "merged", merged, None),
        Step(
            "Compare adapter and merged model",
            Stage(
                name="compare",
                inputs={**models, "merged": merged, "test_set": test_set},
                parameters={**scoring, "thresholds": config.behaviour_thresholds},
                outputs=["proof/behaviour.json"],
                action=lambda: lorasmith.compare(
                    config.base,
                    config.adapter,
                    merged,
                    test_set,
                    run_folder / "proof" / "behaviour.json",
                    thresholds=config.behaviour_thresholds or None,
                    states=run_folder / STATES,
                    progress=progress,
                    **scoring,
                ),
            ),
            {"proof/behaviour.json": BehaviourProof},
        ),
        _comparison_step(config),
        _gates_step(config),
        _card_step(config),
        _package_step(config, progress),
    ]


def merging_rows(config: RunConfig, test_set: Path) -> dict[str, Any]:
    """What a calibrated merge is given: the training files, and the test set that it must not see."""
    if config.rounding not in ("auto", "calibrated") or not config.train:
        return {}
    own = {"template": config.template, "device": config.device}
    return {"calibration": config.train, "test_set": test_set, **own}


def _held_out(rows: Mapping[str, Any]) -> dict[str, Path]:
    return {"test_set": rows["test_set"]} if rows else {}


def check_places(config: RunConfig) -> None:
    """The inputs exist, and the run folder is not one of them: nothing is written before this."""
    for flag, place, wanted in (
        *((("--base", config.base, "dir"),) if hub_name(config.base) is None else ()),
        ("--adapter", config.adapter, "dir"),
        ("--test-set", config.test_set, "file"),
        *(("--train", path, "file") for path in config.train),
    ):
        if not (place.is_dir() if wanted == "dir" else place.is_file()):
            state = "does not exist" if not place.exists() else "is not what is needed"
            kind = "a folder" if wanted == "dir" else "a JSONL file"
            raise InputError(f"{flag} {state}", where=place, expected=kind, remedy="check the path")
    output = config.output.resolve()
    for flag, folder in (("--base", config.base), ("--adapter", config.adapter)):
        if output == folder.resolve() or folder.resolve() in output.parents:
            raise UsageError(
                f"--output lies in the folder of {flag}", where=output, remedy="choose another one"
            )


def _origin(base: Path) -> dict[str, str]:
    """Where the merge's record says that the base comes from."""
    origin = origin_of(base)
    return {"base_repository": origin.repository, "base_commit": origin.commit} if origin else {}


def _numbered(name: str, paths: tuple[Path, ...]) -> dict[str, Path]:
    return {f"{name} {number}": path for number, path in enumerate(paths, 1)}


def _scoring_options(config: RunConfig) -> dict[str, Any]:
    names = (
        "template",
        "loss_on",
        "end_of_turn",
        "device",
        "device_map",
        "arithmetic",
        "batch_tokens",
        "batch_size",
        "max_length",
        "strict",
        "seed",
    )
    return {name: getattr(config, name) for name in names}


def _prepare_test_set(config: RunConfig, progress: Progress) -> None:
    from lorasmith.testset.check import check
    from lorasmith.testset.statistics import describe

    folder = config.output / "testset"
    test_set = folder / "test_set.jsonl"
    write_examples(test_set, read_examples(config.test_set))
    write_record(folder / "statistics.json", describe(test_set))
    if config.train:
        check(test_set, config.train, folder / "contamination.json", progress=progress)
    else:
        reason = "no training file was given (--train)"
        record = ContaminationRecord(verdict="not checked", reason=reason)
        write_record(folder / "contamination.json", record)


def _validation_step(
    run_folder: Path,
    test_set: Path,
    scoring: Mapping[str, Any],
    progress: Progress,
    title: str,
    role: str,
    model: Path,
    adapter: Path | None,
) -> Step:
    folder = run_folder / "validation"
    stage = Stage(
        name=f"validate-{role}",
        inputs={"model": model, "test_set": test_set, **({"adapter": adapter} if adapter else {})},
        parameters=scoring,
        outputs=[f"validation/{role}.json", f"validation/{role}.parquet"],
        action=lambda: lorasmith.validate(
            model,
            test_set,
            folder,
            adapter=adapter,
            role=role,
            states=None if role == "base" else run_folder / STATES,
            progress=progress,
            **scoring,
        ),
    )
    return Step(title, stage, {f"validation/{role}.json": ValidationResult})


def _task_steps(
    config: RunConfig,
    test_set: Path,
    progress: Progress,
    title: str,
    role: str,
    model: Path,
    adapter: Path | None,
) -> list[Step]:
    """The benchmarks' own metrics for one model, where they are asked for."""
    if not config.tasks:
        return []
    from lorasmith.scoring.tasks import evaluate_tasks

    options = {
        name: value
        for name, value in _scoring_options(config).items()
        if name not in ("loss_on", "end_of_turn")
    }
    stage = Stage(
        name=f"tasks-{role}",
        inputs={"model": model, "test_set": test_set, **({"adapter": adapter} if adapter else {})},
        parameters=options,
        outputs=_task_files(role),
        action=lambda: evaluate_tasks(
            model,
            test_set,
            config.output / "validation",
            adapter=adapter,
            role=role,
            progress=progress,
            **options,
        ),
    )
    return [Step(title, stage, {f"validation/{role}_tasks.json": TaskResult})]


def _task_files(role: str) -> list[str]:
    return [f"validation/{role}_tasks.{kind}" for kind in ("json", "parquet")]


def _comparison_step(config: RunConfig) -> Step:
    validation, proof = config.output / "validation", config.output / "proof"

    def summarise() -> None:
        from lorasmith.scoring.paired import paired_effects

        adapter = validation / "adapter.parquet"
        effect, effect_groups = paired_effects(validation / "base.parquet", adapter, seed=config.seed)
        merge_effect, _ = paired_effects(adapter, validation / "merged.parquet", seed=config.seed)
        record = ComparisonRecord(
            adapter_effect=effect,
            adapter_effect_groups=effect_groups,
            merge_effect=merge_effect,
            weights_grade=read_record(proof / "weights.json", WeightProof).grade,
            behaviour_grade=read_record(proof / "behaviour.json", BehaviourProof).grade,
            task_effects=_task_effects(config),
        )
        write_record(proof / "comparison.json", record)

    tables = {role: validation / f"{role}.parquet" for role in ("base", "adapter", "merged")}
    proofs = {name: proof / f"{name}.json" for name in ("weights", "behaviour")}
    if config.tasks:
        tables |= {f"{role} tasks": validation / f"{role}_tasks.parquet" for role in tables}
    stage = Stage(
        "comparison", {**tables, **proofs}, {"seed": config.seed}, ["proof/comparison.json"], summarise
    )
    return Step("Three models side by side", stage, {"proof/comparison.json": ComparisonRecord})


def _task_effects(config: RunConfig) -> dict[str, list[TaskEffect]]:
    """Adapter against base and merged against adapter, on the benchmarks' own metrics."""
    from lorasmith.scoring.paired import paired_tasks

    if not config.tasks:
        return {}
    base, adapter, merged = (
        config.output / "validation" / f"{role}_tasks.parquet" for role in ("base", "adapter", "merged")
    )
    return {
        "effect": paired_tasks(base, adapter, seed=config.seed),
        "merge": paired_tasks(adapter, merged, seed=config.seed),
    }


_MEASURED = (
    "validation/base.json",
    "validation/adapter.json",
    "validation/merged.json",
    "merged/lorasmith_merge.json",
    "proof/weights.json",
    "proof/behaviour.json",
    "proof/comparison.json",
    "testset/contamination.json",
)


def _asked_files(config: RunConfig) -> list[str]:
    """The records of tasks that gates may name."""
    return [f"validation/{role}_tasks.json" for role in ROLES if config.tasks]


def _gates_step(config: RunConfig) -> Step:
    gates, _ = split_costs(config.resolved_gates())
    stage = Stage(
        name="gates",
        inputs={name: config.output / name for name in (*_MEASURED, *_asked_files(config))},
        parameters={"gates": [gate.model_dump(mode="json") for gate in gates]},
        outputs=["gates.json"],
        action=lambda: write_record(
            config.output / "gates.json", evaluate(gates, load_measured(config.output))
        ),
    )
    return Step("Gates", stage, {"gates.json": GateRecord})


def _judge_costs(config: RunConfig, watch: Watcher) -> None:
    """`cost_gates.json`: judged after every command, outside of what is equal between two runs."""
    _, gates = split_costs(config.resolved_gates())
    path = config.output / "cost_gates.json"
    if not gates:
        path.unlink(missing_ok=True)
        return
    record = evaluate(gates, load_measured(config.output))
    write_record(path, record)
    watch.show("cost-gates", record)


def _card_step(config: RunConfig) -> Step:
    from lorasmith.packaging.card import write_card

    run_folder = config.output
    base_card = config.base / CARD
    names = {"base_model": config.base_model_id, "name": config.model_name}
    stage = Stage(
        name="card",
        inputs={
            **{name: run_folder / name for name in (*_MEASURED, "gates.json")},
            "base": config.base,
            "adapter": config.adapter,
            **({"base card": base_card} if base_card.is_file() else {}),
        },
        parameters=names,
        outputs=[f"merged/{CARD}"],
        action=lambda: write_card(run_folder, base=config.base, adapter=config.adapter, **names),
    )
    return Step("Model card", stage, {})


def _package_step(config: RunConfig, progress: Progress) -> Step:
    from lorasmith.packaging.pack import pack
    from lorasmith.reporting.page import write_report

    run_folder = config.output
    names = ("run.json", "testset", "validation", "merged", f"merged/{CARD}", "proof", "gates.json")
    stage = Stage(
        name="package",
        inputs={name: run_folder / name for name in names},
        parameters={"compression": config.compression},
        outputs=["package"],
        action=lambda: pack(
            run_folder,
            run_folder / "package",
            compression=config.compression,
            report=partial(write_report, timings=False),
            progress=progress,
        ),
    )
    return Step("Report and package", stage, {"package/manifest.json": PackageManifest})


def _write_report(run_folder: Path) -> None:
    """The run's own report, with timings: written after every command, since those change."""
    from lorasmith.reporting.page import write_report

    write_report(run_folder, run_folder / "report.html")
