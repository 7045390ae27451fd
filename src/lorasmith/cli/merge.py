"""`lorasmith merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.options import AdaptersInput, BaseInput, ClusterOptions, MergeOptions


def merge(
    base: BaseInput,
    adapters: AdaptersInput,
    output: Annotated[Path, typer.Option(help="Folder to write the merged model to.", metavar="DIR")],
    compare_roundings: Annotated[
        bool,
        typer.Option(
            "--compare-roundings",
            help="Measure every rounding on --test-set and recommend one; --output gets the record alone.",
            rich_help_panel="Merging",
        ),
    ] = False,
    *,
    options: MergeOptions,
    cluster: ClusterOptions,
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
    from lorasmith.executors.choose import make_executor

    executor = make_executor(cluster)
    if compare_roundings:
        if executor.remote:
            raise UsageError("--compare-roundings measures in one process", expected="no --executor ray")
        _compare(base.base, adapters.adapter, output, options, as_json=as_json)
        return
    record = lorasmith.merge(
        base.base,
        adapters.adapter,
        output,
        weights=adapters.weight or None,
        options=options,
        executor=executor,
        progress=bar,
    )
    if as_json:
        show_record(record)
    else:
        proofs.show_merge(record, console())
        console().print(f"Merged model: {output}", markup=False, soft_wrap=True)


def _compare(
    base: Path, adapters: tuple[Path, ...], output: Path, options: MergeOptions, *, as_json: bool
) -> None:
    from lorasmith.cli.console import bar, console, show_record
    from lorasmith.cli.views.records import show_roundings
    from lorasmith.errors import UsageError
    from lorasmith.runs.roundings import compare_roundings

    if options.test_set is None or len(adapters) != 1:
        raise UsageError(
            "--compare-roundings measures one adapter on a test set", expected="one --adapter and --test-set"
        )
    record = compare_roundings(base, adapters[0], options.test_set, output, options=options, progress=bar)
    if as_json:
        show_record(record)
    else:
        show_roundings(record, console())
