"""`lorasmith run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.console import say
from lorasmith.cli.flags import Given
from lorasmith.cli.options import AsJson, GateFormat

if TYPE_CHECKING:
    from lorasmith.options import RunOptions


def run(
    options: Annotated[dict[str, Any], Given(RunOptions)],
    config: Annotated[
        Path | None, typer.Option(help="TOML file with these options; flags win.", metavar="FILE")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config as TOML and stop.")
    ] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Hash every input again.")] = False,
    output_format: GateFormat = "text",
    as_json: AsJson = False,
) -> None:
    """Validate, merge, prove, compare, judge and package, in one resumable run folder.

    A killed run continues when the same command is given again and ends with the same bytes. Exit code 1
    means that it ran and a gate did not pass.

    Example: `lorasmith run --base models/base --adapter models/adapter --test-set test.jsonl --output run`
    """
    from lorasmith.runs.config import load_config, to_toml

    resolved = load_config(config, options)
    if print_config:
        say(to_toml(resolved).rstrip("\n"))
        return
    from lorasmith.cli.console import console
    from lorasmith.cli.gates import check_format, print_gates
    from lorasmith.cli.views import records
    from lorasmith.cli.views.run import TerminalWatcher, show_summary
    from lorasmith.runs.pipeline import run as run_all
    from lorasmith.runs.stages import read_timings

    shown = "json" if as_json else output_format
    check_format(shown)
    watcher = TerminalWatcher(console(stderr=shown != "text"))
    result = run_all(resolved, watcher=watcher, rehash=rehash)
    if shown != "text":
        print_gates(result.judged, shown)
    else:
        records.show_timings(list(read_timings(result.folder).values()), watcher.screen)
        show_summary(result, watcher.screen)
    raise typer.Exit(result.exit_code)
