"""The whole run, top to bottom, as a list of steps.

test set → validate base, adapter → merge → prove → validate merged → compare → gates → card
→ what is asked for after the release → package, report
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from lorasmith.data.rows import fault_error, iterate_rows, read_examples
from lorasmith.data.sources import names_hub, with_local_rows
from lorasmith.errors import DataError, InputError, UsageError
from lorasmith.files import run_layout as layout
from lorasmith.files.atomic import write_record
from lorasmith.files.digests import open_seal, seal_run
from lorasmith.files.run_sources import contradictions
from lorasmith.gates.evaluate import check_gates
from lorasmith.hub.cache import hub_name
from lorasmith.hub.models import local_model
from lorasmith.models.chat_template import use_template
from lorasmith.models.conversation import Wording
from lorasmith.models.load import has_tokenizer, load_tokenizer
from lorasmith.models.text import encode_examples
from lorasmith.options import AnswerOptions, RunOptions
from lorasmith.options.keywords import documented
from lorasmith.preflight.doctor import require_machine
from lorasmith.progress import Unwatched, Watcher
from lorasmith.records.base import Record
from lorasmith.records.dataset import Example
from lorasmith.records.release import RunRecord
from lorasmith.reporting.page import write_report
from lorasmith.runs.config import run_gates
from lorasmith.runs.followup import check_followup, followup_steps, forget_unasked, with_local_draft
from lorasmith.runs.results import RunResult, describe_run, load_result, run_inputs
from lorasmith.runs.stages import RunFolder, open_run
from lorasmith.runs.step import RunContext, Step
from lorasmith.runs.steps import (
    card_step,
    compare_step,
    comparison_step,
    gates_step,
    judge_costs,
    merge_step,
    package_step,
    prove_step,
    task_steps,
    test_set_step,
    validate_step,
)


@documented(RunOptions)
def run(
    options: RunOptions | None = None, *, watcher: Watcher | None = None, rehash: bool = False, **given: Any
) -> RunResult:
    """Validate, merge, prove, compare, judge, report and package; stages that are done are reused.

    Raises `InputError` and `MachineError`; a failed gate is no error but stands in the result.
    """
    asked = RunOptions.given(options, given)
    watch = watcher or Unwatched()
    check_places(asked)
    asked = with_local_rows(asked)
    check_rows(asked)
    check_gates(run_gates(asked))
    base = local_model(asked.base, [asked.adapter], progress=watch.progress)
    asked = with_local_draft(asked.model_copy(update={"base": base}), watch.progress)
    check_followup(asked)
    check_task_module(asked)
    for warning in require_machine(asked):
        watch.show("inputs", warning)  # now, and not after the hours until the merge
    check_tokens(RunContext(asked, watch))
    if asked.budget is not None and not asked.price_per_hour:
        raise UsageError("--budget needs the price of the machine", expected="--price-per-hour, in dollars")
    with open_run(asked.output, rehash=rehash, price_per_hour=asked.price_per_hour) as folder:
        folder.budget = asked.budget
        open_seal(folder.path)
        described = describe_run(asked, rehash=rehash)
        write_record(layout.RUN.at(folder.path), described)
        folder.pinned = {path: described.inputs[name] for name, path in run_inputs(asked).items()}
        _forget_tasks(asked)
        forget_unasked(asked)
        context = RunContext(asked, watch)
        steps = plan(context)
        for number, step in enumerate(steps, 1):
            watch.step(number, len(steps), step.title)
            timing = folder.perform(step.stage)
            watch.finished(step.stage.name, reused=timing.reused, seconds=timing.wall_seconds)
            records = {file.path: file.read(folder.path) for file in step.shows}
            _require_same_inputs(folder, step, described, records)
            for record in records.values():
                watch.show(step.stage.name, record)
        for left in (layout.STATES, layout.FOLLOWUP_WORK):
            shutil.rmtree(folder.path / left, ignore_errors=True)
        judge_costs(context, watch)
        write_report(folder.path, folder.path / layout.REPORT)  # after every command, since it shows times
        seal_run(folder.path)
    return load_result(asked.output)


def _require_same_inputs(
    folder: RunFolder, step: Step, run: RunRecord, records: Mapping[str, Record]
) -> None:
    """Raise `InputError` where a record tells of another base or adapter than the run.

    Its stage found the right one when it began: it was replaced before it was read, and perhaps put back.
    """
    for finding in contradictions(run, records):
        folder.forget(step.stage)
        raise InputError(finding.message, where=folder.path, expected=finding.expected, remedy=finding.remedy)


def _forget_tasks(config: RunOptions) -> None:
    """Remove what an earlier command answered, where nothing is asked now: it is no part of this run."""
    if config.tasks:
        return
    for role, record in layout.TASKS.items():
        for name in (record.path, layout.answers(role), f"{layout.STAGES}/tasks-{role}.json"):
            (config.output / name).unlink(missing_ok=True)


def plan(run: RunContext) -> list[Step]:
    """The steps in order. A stage names what it reads, and is done again exactly when that changes."""
    return [
        test_set_step(run),
        validate_step(run, "base"),
        *task_steps(run, "base"),
        validate_step(run, "adapter"),
        *task_steps(run, "adapter"),
        merge_step(run),
        prove_step(run),
        validate_step(run, "merged"),
        *task_steps(run, "merged"),
        compare_step(run),
        comparison_step(run),
        gates_step(run),
        card_step(run),
        *followup_steps(run),
        package_step(run),
    ]


def check_task_module(config: RunOptions) -> None:
    """A metric of the caller's own is tried on a row now, and not after the hours of a validation."""
    if config.task_module is not None:
        from lorasmith.scoring.tasks import foresee_questions

        foresee_questions(config.test_set, AnswerOptions(), config.task_module)


def check_rows(config: RunOptions) -> None:
    """Every row of the test set and of the training files can be read: known before the first step."""
    for path in (config.test_set, *config.train):
        for row in iterate_rows(path):
            if row.example is None:
                raise fault_error(row, path)


_COMPARED_ROWS = 64


def check_tokens(run: RunContext) -> None:
    """`DataError` where base and adapter would be asked in other tokens: known before three validations.

    Only an adapter that has tokens of its own leaves the base its tokenizer; the first rows are looked at.
    """
    config = run.config
    if run.base_tokenizer is not None or not has_tokenizer(config.adapter):
        return
    examples = [row for row in read_examples(config.test_set) if row.has_reference][:_COMPARED_ROWS]
    base, adapter = (
        _targets(examples, load_tokenizer(config.base, adapter=folder), config)
        for folder in (None, config.adapter)
    )
    for example, ours, theirs in zip(examples, base, adapter, strict=True):
        if ours != theirs:
            raise DataError(
                f"the adapter's tokenizer has tokens of its own, and makes others of row {example.id!r}",
                where=config.test_set,
                expected="the same tokens for all models: they are compared token by token",
                remedy=f"give --tokenizer {config.base} to ask all three in the base's tokens, or `lorasmith "
                "validate` for each model by itself",
            )


def _targets(examples: Sequence[Example], tokenizer: Any, config: RunOptions) -> list[list[int]]:
    use_template(tokenizer, config.chat_template)
    wording = Wording.of(config)
    encoded = encode_examples(
        examples,
        tokenizer,
        template=config.template,
        end_of_turn=config.end_of_turn,
        max_length=1 << 30,
        loss_on=config.loss_on,
        boundary=config.boundary,
        wording=wording,
    )
    return [list(row.targets) for row in encoded.rows]


def check_places(config: RunOptions) -> None:
    """The inputs exist, and the run folder is not one of them: nothing is written before this."""
    rows = (("--test-set", config.test_set), *(("--train", path) for path in config.train))
    for flag, place, wanted in (
        *((("--base", config.base, "dir"),) if hub_name(config.base) is None else ()),
        ("--adapter", config.adapter, "dir"),
        *((flag, path, "rows") for flag, path in rows if not names_hub(path)),
    ):
        if not (place.is_dir() if wanted == "dir" else place.exists()):
            state = "does not exist" if not place.exists() else "is not what is needed"
            kind = "a folder" if wanted == "dir" else "a file or a folder of rows"
            raise InputError(f"{flag} {state}", where=place, expected=kind, remedy="check the path")
    output = config.output.resolve()
    for flag, folder in (("--base", config.base), ("--adapter", config.adapter)):
        if output == folder.resolve() or folder.resolve() in output.parents:
            raise UsageError(
                f"--output lies in the folder of {flag}", where=output, remedy="choose another one"
            )
