"""`lorasmith merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import AsJson, Base, Device, Seed, Template, with_executor

if TYPE_CHECKING:
    from lorasmith.executors.base import Executor


@with_executor
def merge(
    base: Base,
    adapter: Annotated[
        list[Path],
        typer.Option("--adapter", help="Folder of the adapter; several are summed.", metavar="DIR"),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write the merged model to.", metavar="DIR")],
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Weight of each adapter, in their order (1).")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="base (each tensor's own type), float32, bfloat16 or float16.")
    ] = "base",
    rounding: Annotated[
        str,
        typer.Option(
            help="nearest (each element correctly rounded), dithered (unbiased, from --seed), calibrated "
            "(fitted to rows of --calibration), or auto (calibrated if rows are given)."
        ),
    ] = "nearest",
    seed: Seed = 0,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="JSONL that calibrated rounding looks at: the training file.", metavar="FILE"),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="Of the rows, as many as hold so many tokens; fewer take less time.")
    ] = 32_768,
    test_set: Annotated[
        Path | None, typer.Option(help="JSONL whose rows must not be calibrated on.", metavar="FILE")
    ] = None,
    template: Template = "auto",
    device: Device = "auto",
    compare_roundings: Annotated[
        bool,
        typer.Option(
            "--compare-roundings",
            help="Measure every rounding on --test-set and recommend one; --output gets the record alone.",
        ),
    ] = False,
    *,
    executor: Executor,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base: every element is W + s·B·A, rounded once.

    The base is streamed, so memory stays small whatever its size. A killed merge continues when the same
    command is given again.

    Example: `lorasmith merge --base models/base --adapter models/adapter --output models/merged`
    """
    import lorasmith
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views import proofs
    from lorasmith.errors import UsageError

    if compare_roundings:
        if executor.remote:
            raise UsageError("--compare-roundings measures in one process", expected="no --executor ray")
        options: dict[str, Any] = {"calibration": calibration, "calibration_tokens": calibration_tokens}
        options |= {"seed": seed, "template": template, "device": device}
        _compare(base, adapter, output, test_set, options, as_json=as_json)
        return
    record = lorasmith.merge(
        base,
        adapter,
        output,
        weights=weight,
        precision=precision,
        rounding=rounding,
        seed=seed,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        test_set=test_set,
        template=template,
        device=device,
        executor=executor,
        progress=bar,
    )
    if as_json:
        show_record(record)
    else:
        proofs.show_merge(record, console())
        console().print(f"Merged model: {output}", markup=False, soft_wrap=True)


def _compare(
    base: Path,
    adapter: list[Path],
    output: Path,
    test_set: Path | None,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views.records import show_roundings
    from lorasmith.errors import UsageError
    from lorasmith.runs.roundings import compare_roundings

    if test_set is None or len(adapter) != 1:
        raise UsageError(
            "--compare-roundings measures one adapter on a test set", expected="one --adapter and --test-set"
        )
    record = compare_roundings(base, adapter[0], test_set, output, progress=bar, **options)
    if as_json:
        show_record(record)
    else:
        show_roundings(record, console())
