"""The steps of a run up to its package: which stage each is, what it reads, and which function does it.

Each step imports its stage function itself: a mistake in the options is told before torch is loaded.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lorasmith.data.rows import read_rows
from lorasmith.files import run_layout as layout
from lorasmith.files.atomic import write_record
from lorasmith.files.digests import CARD
from lorasmith.files.jsonl import write_examples
from lorasmith.files.run_layout import ROLES, load_records
from lorasmith.gates import evaluate, split_costs
from lorasmith.gates.evaluate import budget_gate
from lorasmith.hub.cache import origin_of
from lorasmith.options import (
    AnswerOptions,
    BatchOptions,
    CompareOptions,
    LossOptions,
    MergeOptions,
    ValidateOptions,
)
from lorasmith.progress import Watcher
from lorasmith.records.dataset import ContaminationRecord
from lorasmith.records.proof import ComparisonRecord
from lorasmith.records.scoring import TaskEffect
from lorasmith.runs.config import run_gates
from lorasmith.runs.followup import packed_records
from lorasmith.runs.stages import Stage
from lorasmith.runs.step import RunContext, Step, numbered

_TITLES = {"base": "base model", "adapter": "LoRA model", "merged": "merged model"}


def test_set_step(run: RunContext) -> Step:
    """The run's own copy of the test set, counted, and held against the training files."""
    stage = Stage(
        name="test-set",
        inputs={"test_set": run.config.test_set, **numbered("train", run.config.train)},
        parameters={},
        outputs=["testset"],
        action=lambda: _prepare_test_set(run),
    )
    return Step("Test set", stage, (layout.STATISTICS, layout.CONTAMINATION))


def _prepare_test_set(run: RunContext) -> None:
    from lorasmith.testset.check import check
    from lorasmith.testset.rows import describe

    contamination = layout.CONTAMINATION.at(run.folder)
    read = read_rows(run.config.test_set)
    write_examples(run.test_set, read.examples)
    counted = describe(run.test_set)
    told = {"findings": [*read.findings, *counted.findings]}
    write_record(layout.STATISTICS.at(run.folder), counted.model_copy(update=told))
    if run.config.train:
        check(run.test_set, run.config.train, contamination, progress=run.progress)
    else:
        reason = "no training file was given (--train)"
        write_record(contamination, ContaminationRecord(verdict="not checked", reason=reason))


def validate_step(run: RunContext, role: str) -> Step:
    """Loss and perplexity of one of the three models."""
    from lorasmith.scoring.validate import validate

    model, adapter = _model(run, role)
    record, executor = layout.VALIDATIONS[role], run.executor
    states = None if role == "base" else run.folder / layout.STATES
    scoring, asked_by = _scoring(run, role)
    options = ValidateOptions.taken_from(scoring, states=states)
    stage = Stage(
        name=f"validate-{role}",
        inputs={
            "model": model,
            "test_set": run.test_set,
            **({"adapter": adapter} if adapter else {}),
            **asked_by,
        },
        parameters=scoring.values(),
        outputs=[record.path, layout.scores(role)],
        action=lambda: validate(
            model,
            run.test_set,
            record.at(run.folder).parent,
            adapter=adapter,
            role=role,
            options=options,
            # The same rows make the same difference in all three models: once is enough.
            both_boundaries=role == "adapter",
            executor=executor,
            progress=run.progress,
        ),
    )
    return Step(f"Validate {_TITLES[role]}", stage, (record,))


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _scoring(run: RunContext, role: str) -> tuple[LossOptions, dict[str, Path]]:
    """How one of the models is asked, and the files of the tokenizer where that is not its own."""
    folder = run.base_tokenizer if role == "base" else run.config.tokenizer
    if folder is None:
        return run.scoring, {}
    files = {name: folder / name for name in _TOKENIZER if (folder / name).is_file()}
    return run.scoring.model_copy(update={"tokenizer": folder}), files


def task_steps(run: RunContext, role: str) -> list[Step]:
    """The benchmarks' own metrics for one model, where they are asked for."""
    if not run.config.tasks:
        return []
    from lorasmith.scoring.tasks import evaluate_tasks

    model, adapter = _model(run, role)
    scoring, asked_by = _scoring(run, role)
    options = AnswerOptions.taken_from(scoring)
    # Named only where it is given: else a stage of an earlier version is the same stage.
    anyway: dict[str, Any] = {"run_code_anyway": True} if run.config.run_code_anyway else {}
    longest = run.config.max_new_tokens
    anyway |= {} if longest is None else {"max_new_tokens": longest}
    record, module = layout.TASKS[role], run.config.task_module
    stage = Stage(
        name=f"tasks-{role}",
        inputs={
            "model": model,
            "test_set": run.test_set,
            **({"adapter": adapter} if adapter else {}),
            **({"task_module": module} if module else {}),
            **asked_by,
        },
        parameters=BatchOptions.taken_from(options).values() | anyway,
        outputs=[record.path, layout.answers(role)],
        action=lambda: evaluate_tasks(
            model,
            run.test_set,
            record.at(run.folder).parent,
            adapter=adapter,
            role=role,
            options=options,
            run_code_anyway=run.config.run_code_anyway,
            task_module=module,
            max_new_tokens=longest,
            executor=run.executor,
            progress=run.progress,
        ),
    )
    return [Step(f"Ask {_TITLES[role]}", stage, (record,))]


def _model(run: RunContext, role: str) -> tuple[Path, Path | None]:
    if role == "merged":
        return run.merged, None
    return run.config.base, run.config.adapter if role == "adapter" else None


# The merge, the proof of its weights, and the comparison of what both models do.


def merge_step(run: RunContext) -> Step:
    """Base and adapter into one folder."""
    from lorasmith.merging.merge import merge

    config, options = run.config, merge_options(run)
    rows = {} if options.test_set is None else {"test_set": options.test_set}
    stage = Stage(
        name="merge",
        inputs={**run.models, **numbered("calibration", options.calibration), **rows},
        parameters={
            **options.model_dump(mode="json", exclude={"calibration", "test_set", "device"}),
            "calibration_tokens": options.calibration_tokens if rows else None,
            **_origin(config.base),
        },
        outputs=[layout.MERGED],
        action=lambda: merge(
            config.base,
            config.adapter,
            run.merged,
            executor=None if rows else run.executor,  # what is fitted to rows is merged in one process
            progress=run.progress,
            **options.values(),
        ),
    )
    return Step("Merge LoRA weights", stage, (layout.MERGE,))


def merge_options(run: RunContext) -> MergeOptions:
    """A calibrated merge is given the training files, and the test set that it must not see."""
    config = run.config
    fitted = config.rounding in ("auto", "calibrated") and bool(config.train)
    return MergeOptions.taken_from(
        config, calibration=config.train if fitted else (), test_set=run.test_set if fitted else None
    )


def _origin(base: Path) -> dict[str, str]:
    """Where the merge's record says that the base comes from."""
    origin = origin_of(base)
    return {"base_repository": origin.repository, "base_commit": origin.commit} if origin else {}


def prove_step(run: RunContext) -> Step:
    """Every element of the merge against its own recomputation."""
    from lorasmith.proving.weights.prove import prove

    config, record = run.config, layout.WEIGHTS
    stage = Stage(
        name="prove-weights",
        inputs={**run.models, "merged": run.merged},
        parameters={},
        outputs=[record.path],
        action=lambda: prove(
            config.base,
            config.adapter,
            run.merged,
            output=record.at(run.folder),
            progress=run.progress,
        ),
    )
    return Step("Prove the weights", stage, (record,))


def compare_step(run: RunContext) -> Step:
    """Adapter and merged model, token by token."""
    from lorasmith.proving.behaviour.compare import compare

    config, record = run.config, layout.BEHAVIOUR
    options = CompareOptions.taken_from(config, states=run.folder / layout.STATES)
    stage = Stage(
        name="compare",
        inputs={**run.models, "merged": run.merged, "test_set": run.test_set},
        parameters={
            **run.scoring.values(),
            "thresholds": config.behaviour_thresholds,
            **({"generate": config.generate} if config.generate else {}),
        },
        outputs=[record.path],
        action=lambda: compare(
            config.base,
            config.adapter,
            run.merged,
            run.test_set,
            record.at(run.folder),
            options=options,
            thresholds=config.behaviour_thresholds or None,
            executor=run.executor,
            progress=run.progress,
        ),
    )
    return Step("Compare adapter and merged model", stage, (record,))


def comparison_step(run: RunContext) -> Step:
    """Three models side by side: the adapter's effect, the merge's effect, both grades."""
    tables = {role: run.folder / layout.scores(role) for role in ROLES}
    if run.config.tasks:
        tables |= {f"{role} tasks": run.folder / layout.answers(role) for role in ROLES}
    proofs = {"weights": layout.WEIGHTS.at(run.folder), "behaviour": layout.BEHAVIOUR.at(run.folder)}
    stage = Stage(
        name="comparison",
        inputs={**tables, **proofs},
        parameters={"seed": run.config.seed},
        outputs=[layout.COMPARISON.path],
        action=lambda: _write_comparison(run),
    )
    return Step("Three models side by side", stage, (layout.COMPARISON,))


def _write_comparison(run: RunContext) -> None:
    from lorasmith.scoring.paired import paired_effects

    base, adapter, merged = (run.folder / layout.scores(role) for role in ROLES)
    seed = run.config.seed
    effect, effect_groups = paired_effects(base, adapter, seed=seed)
    merge_effect, _ = paired_effects(adapter, merged, seed=seed)
    record = ComparisonRecord(
        adapter_effect=effect,
        adapter_effect_groups=effect_groups,
        merge_effect=merge_effect,
        weights_grade=layout.WEIGHTS.read(run.folder).grade,
        behaviour_grade=layout.BEHAVIOUR.read(run.folder).grade,
        task_effects=_task_effects(run),
    )
    write_record(layout.COMPARISON.at(run.folder), record)


def _task_effects(run: RunContext) -> dict[str, list[TaskEffect]]:
    """Adapter against base and merged against adapter, on the benchmarks' own metrics."""
    from lorasmith.scoring.paired import paired_tasks

    if not run.config.tasks:
        return {}
    base, adapter, merged = (run.folder / layout.answers(role) for role in ROLES)
    seed = run.config.seed
    return {
        "effect": paired_tasks(base, adapter, seed=seed),
        "merge": paired_tasks(adapter, merged, seed=seed),
    }


# What the run comes to: gates, the model's card, the report, the package.


def gates_step(run: RunContext) -> Step:
    """Every gate but those on costs, which are no function of the inputs."""
    gates, _ = split_costs(run_gates(run.config))
    answered = layout.TASKS.values() if run.config.tasks else ()
    files = (*layout.MEASURED, *answered)
    stage = Stage(
        name="gates",
        inputs={file.path: file.at(run.folder) for file in files},
        parameters={"gates": [gate.model_dump(mode="json") for gate in gates]},
        outputs=[layout.GATES.path],
        action=lambda: write_record(
            layout.GATES.at(run.folder), evaluate(gates, load_records(run.folder, files))
        ),
    )
    return Step("Gates", stage, (layout.GATES,))


def judge_costs(run: RunContext, watch: Watcher) -> None:
    """`cost_gates.json`: judged after every command, outside of what is equal between two runs."""
    _, gates = split_costs(run_gates(run.config))
    if run.config.budget is not None:
        gates.append(budget_gate(run.config.budget))
    path = layout.COST_GATES.at(run.folder)
    if not gates:
        path.unlink(missing_ok=True)
        return
    record = evaluate(gates, load_records(run.folder, (layout.TIMING,)))
    write_record(path, record)
    watch.show("cost-gates", record)


def card_step(run: RunContext) -> Step:
    """The merged model's README, from the records."""
    from lorasmith.packaging.card import write_card

    config, folder = run.config, run.folder
    base_card = config.base / CARD
    names = {"base_model": config.base_model_id, "name": config.model_name}
    stage = Stage(
        name="card",
        inputs={
            **{file.path: file.at(folder) for file in (*layout.MEASURED, layout.GATES)},
            **run.models,
            **({"base card": base_card} if base_card.is_file() else {}),
        },
        parameters=names,
        outputs=[f"{layout.MERGED}/{CARD}"],
        action=lambda: write_card(folder, base=config.base, adapter=config.adapter, **names),
    )
    return Step("Model card", stage)


def package_step(run: RunContext) -> Step:
    """Evidence and model as archives; the report in it comes without timings, which differ between runs."""
    from lorasmith.packaging.pack import pack
    from lorasmith.reporting.page import write_report

    names = [layout.RUN.path, "testset", "validation", layout.MERGED, f"{layout.MERGED}/{CARD}", "proof"]
    names += [layout.GATES.path, *(file.path for file in packed_records(run))]
    stage = Stage(
        name="package",
        inputs={name: run.folder / name for name in names},
        parameters={"compression": run.config.compression},
        outputs=[layout.PACKAGE],
        action=lambda: pack(
            run.folder,
            run.folder / layout.PACKAGE,
            compression=run.config.compression,
            report=partial(write_report, timings=False),
            progress=run.progress,
        ),
    )
    return Step("Report and package", stage, (layout.MANIFEST,))
