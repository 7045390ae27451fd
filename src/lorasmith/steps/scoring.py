"""The three models on the test set: losses, the benchmarks' own metrics, paired differences."""

from __future__ import annotations

from pathlib import Path

import lorasmith
from lorasmith.files.atomic import read_record, write_record
from lorasmith.records.proof import BehaviourProof, ComparisonRecord, WeightProof
from lorasmith.records.scoring import TaskEffect, TaskResult, ValidationResult
from lorasmith.results import ROLES
from lorasmith.stages import Stage
from lorasmith.steps.base import STATES, RunContext, Step

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
