"""The whole run, top to bottom, as a list of steps.

test set → validate base, adapter → merge → prove → validate merged → compare → gates → card
→ what is asked for after the release → package, report
"""

from __future__ import annotations

import shutil
from typing import Any

from lorasmith.errors import InputError, UsageError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.gates.evaluate import check_gates
from lorasmith.hub.cache import hub_name
from lorasmith.hub.models import local_model
from lorasmith.preflight.doctor import require_machine
from lorasmith.progress import Unwatched, Watcher
from lorasmith.runs.config import RunConfig, make_config
from lorasmith.runs.followup import WORK, check_followup, follow_up, forget_unasked, with_local_draft
from lorasmith.runs.results import ROLES, RunResult, describe_run, load_result
from lorasmith.runs.stages import open_run
from lorasmith.runs.step import STATES, RunContext, Step
from lorasmith.runs.steps import (
    ask,
    compare,
    judge,
    judge_costs,
    merge,
    open_seal,
    package,
    prepare_test_set,
    prove,
    report,
    seal,
    summarise,
    task_files,
    validate,
    write_card,
)


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
    asked = with_local_draft(asked.model_copy(update={"base": base}), watch.progress)
    check_followup(asked)
    require_machine(asked)
    if asked.budget is not None and not asked.price_per_hour:
        raise UsageError("--budget needs the price of the machine", expected="--price-per-hour, in dollars")
    with open_run(asked.output, rehash=rehash, price_per_hour=asked.price_per_hour) as folder:
        folder.budget = asked.budget
        open_seal(folder.path)
        write_record(folder.path / "run.json", describe_run(asked, rehash=rehash))
        if not asked.tasks:  # what an earlier command answered is no part of this run
            for role in ROLES:
                for name in (*task_files(role), f"stages/tasks-{role}.json"):
                    (folder.path / name).unlink(missing_ok=True)
        forget_unasked(asked)
        context = RunContext(asked, watch)
        steps = plan(context)
        for number, step in enumerate(steps, 1):
            watch.step(number, len(steps), step.title)
            timing = folder.perform(step.stage)
            watch.finished(step.stage.name, reused=timing.reused, seconds=timing.wall_seconds)
            for name, kind in step.shows.items():
                watch.show(step.stage.name, read_record(folder.path / name, kind))
        for left in (STATES, WORK):
            shutil.rmtree(folder.path / left, ignore_errors=True)
        judge_costs(context, watch)
        report(folder.path)
        seal(folder.path)
    return load_result(asked.output)


def plan(run: RunContext) -> list[Step]:
    """The steps in order. A stage names what it reads, and is done again exactly when that changes."""
    return [
        prepare_test_set(run),
        validate(run, "base"),
        *ask(run, "base"),
        validate(run, "adapter"),
        *ask(run, "adapter"),
        merge(run),
        prove(run),
        validate(run, "merged"),
        *ask(run, "merged"),
        compare(run),
        summarise(run),
        judge(run),
        write_card(run),
        *follow_up(run),
        package(run),
    ]


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
