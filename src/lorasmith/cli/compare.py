"""`lorasmith compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.options import Adapter, AsJson, Base, Device, Merged, Seed, Template, TestSet


def compare(
    base: Base,
    adapter: Adapter,
    merged: Merged,
    test_set: TestSet,
    output: Annotated[Path | None, typer.Option(help="File for the record.", metavar="FILE")] = None,
    template: Template = "auto",
    device: Device = "auto",
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at rows that would be cut.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compare adapter and merged model token by token, and grade the behaviour.

    Exit code 1 when the behaviour has `drifted`.

    Example: `lorasmith compare --base base --adapter adapter --merged merged --test-set test.jsonl`
    """
    import lorasmith
    from lorasmith.cli import views
    from lorasmith.cli.console import bar, console, show_record

    proof = lorasmith.compare(
        base,
        adapter,
        merged,
        test_set,
        output,
        template=template,
        device=device,
        batch_tokens=batch_tokens,
        max_length=max_length,
        strict=strict,
        seed=seed,
        progress=bar,
    )
    if as_json:
        show_record(proof)
    else:
        views.show_behaviour(proof, console())
    if proof.grade == "drifted":
        raise typer.Exit(1)
