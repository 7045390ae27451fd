"""`lorasmith compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.cluster import with_executor
from lorasmith.cli.options import (
    Adapter,
    Arithmetic,
    AsJson,
    Base,
    BatchSize,
    BatchTokens,
    Device,
    DeviceMap,
    EndOfTurn,
    Limit,
    LossOn,
    MaxLength,
    Merged,
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
def compare(
    base: Base,
    adapter: Adapter,
    merged: Merged,
    test_set: TestSet,
    output: Annotated[Path | None, typer.Option(help="File for the record.", metavar="FILE")] = None,
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
    generate: Annotated[
        int | None, typer.Option(help="Also let both models write so many tokens after each prompt.")
    ] = None,
    states: States = None,
    *,
    executor: Executor,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compare adapter and merged model token by token, and grade the behaviour.

    Exit code 1 when the behaviour has `drifted`.

    Example: `lorasmith compare --base base --adapter adapter --merged merged --test-set test.jsonl`
    """
    asked = locals()
    import lorasmith
    from lorasmith.cli import proof_views
    from lorasmith.cli.console import bar, console, show_record

    proof = lorasmith.compare(**taken_by(lorasmith.compare, asked), progress=bar)
    if as_json:
        show_record(proof)
    else:
        proof_views.show_behaviour(proof, console())
    if proof.grade == "drifted":
        raise typer.Exit(1)
