"""`lorasmith compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.options import ClusterOptions, CompareInput, CompareOptions


def compare(
    inputs: CompareInput,
    output: Annotated[Path | None, typer.Option(help="File for the record.", metavar="FILE")] = None,
    *,
    options: CompareOptions,
    cluster: ClusterOptions,
    as_json: AsJson = False,
) -> None:
    """Compare adapter and merged model token by token, and grade the behaviour.

    Exit code 1 when the behaviour has `drifted`.

    Example: `lorasmith compare --base base --adapter adapter --merged merged --test-set test.jsonl`
    """
    import lorasmith
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views import proofs
    from lorasmith.executors.choose import make_executor

    executor = make_executor(cluster)
    proof = lorasmith.compare(
        inputs.base,
        inputs.adapter,
        inputs.merged,
        inputs.test_set,
        output,
        options=options,
        executor=executor,
        progress=bar,
    )
    if as_json:
        show_record(proof)
    else:
        proofs.show_behaviour(proof, console())
    if proof.grade == "drifted":
        raise typer.Exit(1)
