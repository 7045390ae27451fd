"""`lorasmith validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.options import (
        ClusterOptions,
        CodeOptions,
        ModelInput,
        RowsInput,
        TaskOptions,
        ValidateOptions,
    )


def validate(
    inputs: ModelInput,
    rows: RowsInput,
    output: Annotated[Path, typer.Option(help="Folder for ROLE.json and ROLE.parquet.", metavar="DIR")],
    role: Annotated[
        str | None, typer.Option(help="Name of the result: base, adapter or merged. [adapter or base]")
    ] = None,
    *,
    questions: TaskOptions,
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
    from lorasmith.data.rows import read_examples
    from lorasmith.data.sources import local_rows
    from lorasmith.errors import UsageError
    from lorasmith.executors.choose import make_executor
    from lorasmith.options import AnswerOptions

    if code.run_code_anyway and not questions.tasks:
        raise UsageError("--run-code-anyway without --tasks: no code would be run", expected="both or none")
    if questions.tasks:
        from lorasmith.scoring.tasks import evaluate_tasks, foresee_questions
        from lorasmith.scoring.validate import forget_journal

        foresee_questions(rows.test_set, options, questions.task_module)
    files = (inputs.model, rows.test_set, output)
    how: dict[str, Any] = {"adapter": inputs.adapter, "role": role, "executor": make_executor(cluster)}
    scored = not questions.tasks or any(
        example.has_reference for example in read_examples(local_rows(rows.test_set, options))
    )
    if not scored and not as_json:
        console().print("No row has a reference answer, of which a loss could be computed: asked only.")
    # Interrupted while it asks, the same command has nothing of the validation to compute again.
    result = (
        lorasmith.validate(*files, options=options, keep_journal=questions.tasks, progress=bar, **how)
        if scored
        else None
    )
    if result is not None and not as_json:
        records.show_validation(result, console())
        console().print(f"Results: {output / (result.model.role + '.json')}", markup=False, soft_wrap=True)
    if result is not None and not questions.tasks:
        if as_json:
            show_record(result)
        return
    asking = AnswerOptions.taken_from(options)
    answered = evaluate_tasks(
        *files,
        options=asking,
        progress=bar,
        run_code_anyway=code.run_code_anyway,
        task_module=questions.task_module,
        max_new_tokens=questions.max_new_tokens,
        **how,
    )
    forget_journal(output, answered.model.role)
    if as_json:
        show_records(**({} if result is None else {"validation": result}), tasks=answered)
    else:
        records.show_tasks(answered, console())
        console().print(
            f"Results: {output / (answered.model.role + '_tasks.json')}", markup=False, soft_wrap=True
        )
