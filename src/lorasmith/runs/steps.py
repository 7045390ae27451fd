"""The run's own copy of the test set, counted, and held against the training files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lorasmith
from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.digests import CARD
from lorasmith.files.jsonl import read_examples, write_examples
from lorasmith.gates import evaluate, split_costs
from lorasmith.hub.cache import origin_of
from lorasmith.progress import Watcher
from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, ComparisonRecord, WeightProof
from lorasmith.records.release import Gate, GateRecord, PackageManifest
from lorasmith.records.scoring import TaskEffect, TaskResult, ValidationResult
from lorasmith.runs.followup import packed_records
from lorasmith.runs.results import ROLES, load_measured
from lorasmith.runs.stages import Stage
from lorasmith.runs.step import MEASURED, STATES, RunContext, Step, numbered


def prepare_test_set(run: RunContext) -> Step:
    """Copy, count, check for contamination."""
    stage = Stage(
        name="test-set",
        inputs={"test_set": run.config.test_set, **numbered("train", run.config.train)},
        parameters={},
        outputs=["testset"],
        action=lambda: _prepare(run),
    )
    return Step(
        "Test set",
        stage,
        {"testset/statistics.json": DatasetStatistics, "testset/contamination.json": ContaminationRecord},
    )


def _prepare(run: RunContext) -> None:
    from lorasmith.testset.check import check
    from lorasmith.testset.rows import describe

    folder = run.test_set.parent
    write_examples(run.test_set, read_examples(run.config.test_set))
    write_record(folder / "statistics.json", describe(run.test_set))
    if run.config.train:
        check(run.test_set, run.config.train, folder / "contamination.json", progress=run.progress)
    else:
        reason = "no training file was given (--train)"
        record = ContaminationRecord(verdict="not checked", reason=reason)
        write_record(folder / "contamination.json", record)


# The merge, the proof of its weights, and the comparison of what both models do.


def merge(run: RunContext) -> Step:
    """Base and adapter into one folder."""
    config = run.config
    options: dict[str, Any] = {
        "precision": config.precision,
        "rounding": config.rounding,
        "seed": config.seed,
    }
    rows = merging_rows(run)
    stage = Stage(
        name="merge",
        inputs={**run.models, **numbered("calibration", rows.get("calibration", ())), **_held_out(rows)},
        parameters={
            **options,
            "template": config.template,
            "calibration_tokens": rows.get("calibration_tokens"),
            **_origin(config.base),
        },
        outputs=["merged"],
        action=lambda: lorasmith.merge(
            config.base,
            config.adapter,
            run.merged,
            executor=None if rows else run.executor,  # what is fitted to rows is merged in one process
            progress=run.progress,
            **options,
            **rows,
        ),
    )
    return Step("Merge LoRA weights", stage, {"merged/lorasmith_merge.json": MergeRecord})


def prove(run: RunContext) -> Step:
    """Every element of the merge against its own recomputation."""
    config = run.config
    stage = Stage(
        name="prove-weights",
        inputs={**run.models, "merged": run.merged},
        parameters={},
        outputs=["proof/weights.json"],
        action=lambda: lorasmith.prove(
            config.base,
            config.adapter,
            run.merged,
            output=run.folder / "proof" / "weights.json",
            progress=run.progress,
        ),
    )
    return Step("Prove the weights", stage, {"proof/weights.json": WeightProof})


def compare(run: RunContext) -> Step:
    """Adapter and merged model, token by token."""
    config, scoring = run.config, run.scoring
    stage = Stage(
        name="compare",
        inputs={**run.models, "merged": run.merged, "test_set": run.test_set},
        parameters={
            **scoring,
            "thresholds": config.behaviour_thresholds,
            **({"generate": config.generate} if config.generate else {}),
        },
        outputs=["proof/behaviour.json"],
        action=lambda: lorasmith.compare(
            config.base,
            config.adapter,
            run.merged,
            run.test_set,
            run.folder / "proof" / "behaviour.json",
            thresholds=config.behaviour_thresholds or None,
            generate=config.generate,
            states=run.folder / STATES,
            executor=run.executor,
            progress=run.progress,
            **scoring,
        ),
    )
    return Step("Compare adapter and merged model", stage, {"proof/behaviour.json": BehaviourProof})


def merging_rows(run: RunContext) -> dict[str, Any]:
    """What a calibrated merge is given: the training files, and the test set that it must not see."""
    config = run.config
    if config.rounding not in ("auto", "calibrated") or not config.train:
        return {}
    own: dict[str, Any] = {"template": config.template, "device": config.device}
    budget = config.calibration_tokens
    return {"calibration": config.train, "calibration_tokens": budget, "test_set": run.test_set, **own}


def _held_out(rows: Mapping[str, Any]) -> dict[str, Path]:
    return {"test_set": rows["test_set"]} if rows else {}


def _origin(base: Path) -> dict[str, str]:
    """Where the merge's record says that the base comes from."""
    origin = origin_of(base)
    return {"base_repository": origin.repository, "base_commit": origin.commit} if origin else {}


# What the run comes to: gates, the model's card, the report, the package.


def judge(run: RunContext) -> Step:
    """Every gate but those on costs, which are no function of the inputs."""
    gates, _ = split_costs(run.config.resolved_gates())
    answered = [f"validation/{role}_tasks.json" for role in ROLES if run.config.tasks]
    stage = Stage(
        name="gates",
        inputs={name: run.folder / name for name in (*MEASURED, *answered)},
        parameters={"gates": [gate.model_dump(mode="json") for gate in gates]},
        outputs=["gates.json"],
        action=lambda: write_record(run.folder / "gates.json", evaluate(gates, load_measured(run.folder))),
    )
    return Step("Gates", stage, {"gates.json": GateRecord})


def judge_costs(run: RunContext, watch: Watcher) -> None:
    """`cost_gates.json`: judged after every command, outside of what is equal between two runs."""
    _, gates = split_costs(run.config.resolved_gates())
    if run.config.budget is not None:  # kept out of the gates of run.json, which money must not change
        limit = run.config.budget
        gates.append(Gate(name="--budget", metric="cost.dollars", comparison="<=", threshold=limit))
    path = run.folder / "cost_gates.json"
    if not gates:
        path.unlink(missing_ok=True)
        return
    record = evaluate(gates, load_measured(run.folder))
    write_record(path, record)
    watch.show("cost-gates", record)


def write_card(run: RunContext) -> Step:
    """The merged model's README, from the records."""
    from lorasmith.packaging import card

    config, folder = run.config, run.folder
    base_card = config.base / CARD
    names = {"base_model": config.base_model_id, "name": config.model_name}
    stage = Stage(
        name="card",
        inputs={
            **{name: folder / name for name in (*MEASURED, "gates.json")},
            **run.models,
            **({"base card": base_card} if base_card.is_file() else {}),
        },
        parameters=names,
        outputs=[f"merged/{CARD}"],
        action=lambda: card.write_card(folder, base=config.base, adapter=config.adapter, **names),
    )
    return Step("Model card", stage, {})


def package(run: RunContext) -> Step:
    """Evidence and model as archives; the report in it comes without timings, which differ between runs."""
    from lorasmith.packaging.pack import pack
    from lorasmith.reporting.page import write_report

    names = ["run.json", "testset", "validation", "merged", f"merged/{CARD}", "proof", "gates.json"]
    names += packed_records(run)
    stage = Stage(
        name="package",
        inputs={name: run.folder / name for name in names},
        parameters={"compression": run.config.compression},
        outputs=["package"],
        action=lambda: pack(
            run.folder,
            run.folder / "package",
            compression=run.config.compression,
            report=partial(write_report, timings=False),
            progress=run.progress,
        ),
    )
    return Step("Report and package", stage, {"package/manifest.json": PackageManifest})


def report(run_folder: Path) -> None:
    """The run's own page, with timings: written after every command, since those change."""
    from lorasmith.reporting.page import write_report

    write_report(run_folder, run_folder / "report.html")


def open_seal(run_folder: Path) -> None:
    """Before the first step: from here on the run has not ended."""
    from lorasmith.files import digests

    digests.open_seal(run_folder)


def seal(run_folder: Path) -> None:
    """After the last step: the checksums of all that lies there, for `lorasmith verify`."""
    from lorasmith.files import digests

    digests.seal_run(run_folder)


# The three models on the test set: losses, the benchmarks' own metrics, paired differences.


_TITLES = {"base": "base model", "adapter": "LoRA model", "merged": "merged model"}


def validate(run: RunContext, role: str) -> Step:
    """Loss and perplexity of one of the three models."""
    model, adapter = _model(run, role)
    folder, scoring, executor = run.folder / "validation", run.scoring, run.executor
    stage = Stage(
        name=f"validate-{role}",
        inputs={"model": model, "test_set": run.test_set, **({"adapter": adapter} if adapter else {})},
        parameters=scoring,
        outputs=[f"validation/{role}.json", f"validation/{role}.parquet"],
        action=lambda: lorasmith.validate(
            model,
            run.test_set,
            folder,
            adapter=adapter,
            role=role,
            states=None if role == "base" else run.folder / STATES,
            executor=executor,
            progress=run.progress,
            **scoring,
        ),
    )
    return Step(f"Validate {_TITLES[role]}", stage, {f"validation/{role}.json": ValidationResult})


def ask(run: RunContext, role: str) -> list[Step]:
    """The benchmarks' own metrics for one model, where they are asked for."""
    if not run.config.tasks:
        return []
    from lorasmith.scoring.tasks import evaluate_tasks

    model, adapter = _model(run, role)
    options = {name: value for name, value in run.scoring.items() if name not in ("loss_on", "end_of_turn")}
    stage = Stage(
        name=f"tasks-{role}",
        inputs={"model": model, "test_set": run.test_set, **({"adapter": adapter} if adapter else {})},
        parameters=options,
        outputs=task_files(role),
        action=lambda: evaluate_tasks(
            model,
            run.test_set,
            run.folder / "validation",
            adapter=adapter,
            role=role,
            executor=run.executor,
            progress=run.progress,
            **options,
        ),
    )
    return [Step(f"Ask {_TITLES[role]}", stage, {f"validation/{role}_tasks.json": TaskResult})]


def task_files(role: str) -> list[str]:
    """What `ask` leaves for a model, below the run folder."""
    return [f"validation/{role}_tasks.{kind}" for kind in ("json", "parquet")]


def summarise(run: RunContext) -> Step:
    """Three models side by side: the adapter's effect, the merge's effect, both grades."""
    validation, proof = run.folder / "validation", run.folder / "proof"
    tables = {role: validation / f"{role}.parquet" for role in ROLES}
    if run.config.tasks:
        tables |= {f"{role} tasks": validation / f"{role}_tasks.parquet" for role in ROLES}
    proofs = {name: proof / f"{name}.json" for name in ("weights", "behaviour")}
    stage = Stage(
        name="comparison",
        inputs={**tables, **proofs},
        parameters={"seed": run.config.seed},
        outputs=["proof/comparison.json"],
        action=lambda: _summarise(run, validation, proof),
    )
    return Step("Three models side by side", stage, {"proof/comparison.json": ComparisonRecord})


def _model(run: RunContext, role: str) -> tuple[Path, Path | None]:
    if role == "merged":
        return run.merged, None
    return run.config.base, run.config.adapter if role == "adapter" else None


def _summarise(run: RunContext, validation: Path, proof: Path) -> None:
    from lorasmith.scoring.paired import paired_effects

    seed, adapter = run.config.seed, validation / "adapter.parquet"
    effect, effect_groups = paired_effects(validation / "base.parquet", adapter, seed=seed)
    merge_effect, _ = paired_effects(adapter, validation / "merged.parquet", seed=seed)
    record = ComparisonRecord(
        adapter_effect=effect,
        adapter_effect_groups=effect_groups,
        merge_effect=merge_effect,
        weights_grade=read_record(proof / "weights.json", WeightProof).grade,
        behaviour_grade=read_record(proof / "behaviour.json", BehaviourProof).grade,
        task_effects=_task_effects(run, validation),
    )
    write_record(proof / "comparison.json", record)


def _task_effects(run: RunContext, validation: Path) -> dict[str, list[TaskEffect]]:
    """Adapter against base and merged against adapter, on the benchmarks' own metrics."""
    from lorasmith.scoring.paired import paired_tasks

    if not run.config.tasks:
        return {}
    base, adapter, merged = (validation / f"{role}_tasks.parquet" for role in ROLES)
    seed = run.config.seed
    return {
        "effect": paired_tasks(base, adapter, seed=seed),
        "merge": paired_tasks(adapter, merged, seed=seed),
    }
