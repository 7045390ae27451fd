"""`lorasmith validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import AsJson, TestSet

if TYPE_CHECKING:
    from lorasmith.options import ClusterOptions, CodeOptions, ValidateOptions


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
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Also answer the benchmarks' questions and score the answers.")
    ] = False,
    *,
    options: ValidateOptions,
    code: CodeOptions,
    cluster: ClusterOptions,
    as_json: AsJson = False,
) -> None:
    """Loss and perplexity on response tokens, for all and by source, domain and difficulty.

    Example: `lorasmith validate --model base --adapter adapter --test-set test.jsonl --output validation`
    """
    import lorasmith
    from lorasmith.cli.console import bar, console, show_record, show_records
    from lorasmith.cli.views import records
    from lorasmith.errors import UsageError
    from lorasmith.executors.choose import make_executor
    from lorasmith.options import AnswerOptions

    if code.run_code_anyway and not tasks:
        raise UsageError("--run-code-anyway without --tasks: no code would be run", expected="both or none")
    if tasks:
        from lorasmith.scoring.tasks import evaluate_tasks, foresee_questions
        from lorasmith.scoring.validate import forget_journal

        foresee_questions(test_set, limit=options.limit, shuffle_seed=options.shuffle_seed)
    what: dict[str, Any] = {
        "adapter": adapter,
        "role": role,
        "executor": make_executor(cluster),
        "progress": bar,
    }
    # Interrupted while it asks, the same command has nothing of the validation to compute again.
    result = lorasmith.validate(model, test_set, output, keep_journal=tasks, **what, **options.values())
    if not as_json:
        records.show_validation(result, console())
        console().print(f"Results: {output / (result.model.role + '.json')}", markup=False, soft_wrap=True)
    if not tasks:
        if as_json:
            show_record(result)
        return
    asking = AnswerOptions.taken_from(options).values()
    answered = evaluate_tasks(model, test_set, output, **what, **asking, **code.values())
    forget_journal(output, result.model.role)
    if as_json:
        show_records(validation=result, tasks=answered)
    else:
        records.show_tasks(answered, console())
        console().print(
            f"Results: {output / (result.model.role + '_tasks.json')}", markup=False, soft_wrap=True
        )
