"""`lorasmith validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.cluster import with_executor
from lorasmith.cli.options import (
    Arithmetic,
    AsJson,
    BatchSize,
    BatchTokens,
    Device,
    DeviceMap,
    EndOfTurn,
    Limit,
    LossOn,
    MaxLength,
    Seed,
    ShuffleSeed,
    States,
    Strict,
    Template,
    TestSet,
    taken_by,
)

if TYPE_CHECKING:
    from lorasmith.executors.base import Executor


@with_executor
def validate(
    model: Annotated[
        Path,
        typer.Option(help="Folder of base or merged, or org/name[@revision] on the hub.", metavar="MODEL"),
    ],
    test_set: TestSet,
    output: Annotated[Path, typer.Option(help="Folder for ROLE.json and ROLE.parquet.", metavar="DIR")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter to score on top of the model.", metavar="DIR")
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="Name of the result: base, adapter or merged. [adapter or base]")
    ] = None,
    template: Template = "auto",
    loss_on: LossOn = "response",
    end_of_turn: EndOfTurn = True,
    device: Device = "auto",
    device_map: DeviceMap = None,
    arithmetic: Arithmetic = "auto",
    batch_tokens: BatchTokens = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    limit: Limit = None,
    shuffle_seed: ShuffleSeed = None,
    strict: Strict = False,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Also answer the benchmarks' questions and score the answers.")
    ] = False,
    states: States = None,
    *,
    executor: Executor,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Loss and perplexity on response tokens, for all and by source, domain and difficulty.

    Example: `lorasmith validate --model base --adapter adapter --test-set test.jsonl --output validation`
    """
    asked = locals()
    import lorasmith
    from lorasmith.cli import views
    from lorasmith.cli.console import bar, console, show_record, show_records

    if tasks:
        from lorasmith.scoring.tasks import evaluate_tasks, foresee_questions
        from lorasmith.scoring.validate import forget_journal

        foresee_questions(**taken_by(foresee_questions, asked))
    # Interrupted while it asks, the same command has nothing of the validation to compute again.
    result = lorasmith.validate(**taken_by(lorasmith.validate, asked), keep_journal=tasks, progress=bar)
    if not as_json:
        views.show_validation(result, console())
        console().print(f"Results: {output / (result.model.role + '.json')}")
    if not tasks:
        if as_json:
            show_record(result)
        return
    answered = evaluate_tasks(**taken_by(evaluate_tasks, asked), progress=bar)
    forget_journal(output, result.model.role)
    if as_json:
        show_records(validation=result, tasks=answered)
    else:
        views.show_tasks(answered, console())
        console().print(f"Results: {output / (result.model.role + '_tasks.json')}")
