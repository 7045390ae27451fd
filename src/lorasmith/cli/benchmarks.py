"""`lorasmith benchmarks list | fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.options import AsJson

if TYPE_CHECKING:
    from lorasmith.options import BenchmarkOptions


def list_() -> None:
    """Every benchmark that can be built, fetched and asked: how it is answered, and under which licence.

    Example: `lorasmith benchmarks list`
    """
    from lorasmith.benchmarks.registry import BENCHMARKS, THE_FIVE
    from lorasmith.cli.console import console, table

    rows = [
        [
            benchmark.name,
            "by default" if benchmark in THE_FIVE else "where named",
            benchmark.domain,
            _ANSWERED_BY[benchmark.answered_by].format(benchmark.max_new_tokens),
            benchmark.licence.partition(",")[0],
        ]
        for benchmark in BENCHMARKS
    ]
    columns = ("benchmark", "taken", "domain", "answered by", "licence")
    console().print(table("Benchmarks", columns, rows))


list_.works_without_arguments = True  # type: ignore[attr-defined]

_ANSWERED_BY = {
    "text": "text, {} tokens",
    "letter": "likeliest letter",
    "ending": "likeliest ending",
}


def fetch(
    output: Annotated[Path, typer.Option(help="Folder for the benchmarks.", metavar="DIR")],
    *,
    options: BenchmarkOptions,
    as_json: AsJson = False,
) -> None:
    """Download DROP, GPQA, HumanEval, MATH-500 and MMLU, or those named, from the hub, pinned and checked.

    The token for the gated GPQA comes from HF_TOKEN or `hf auth login`. Exit code 3 when one is missing.

    Example: `lorasmith benchmarks fetch --output data/benchmarks`
    """
    from lorasmith.benchmarks.fetch import fetch as fetch_benchmarks
    from lorasmith.cli.console import bar, console, show_record, table
    from lorasmith.cli.views import records
    from lorasmith.errors import ExitCode
    from lorasmith.machine.resources import human_bytes

    record = fetch_benchmarks(output, only=options.only or None, progress=bar)
    if as_json:
        show_record(record)
    else:
        rows = [
            [file.benchmark, file.path, human_bytes(file.bytes), file.sha256[:16]] for file in record.files
        ]
        console().print(table("Fetched", ("benchmark", "file", "size", "SHA-256"), rows))
        records.show_findings(record.findings, console())
    if any(finding.severity == "error" for finding in record.findings):
        raise typer.Exit(ExitCode.MACHINE)
