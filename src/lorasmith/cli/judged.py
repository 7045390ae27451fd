"""Verdicts of gates on standard output, in the format that was asked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.errors import UsageError, os_errors

if TYPE_CHECKING:
    from lorasmith.records.release import GateRecord


def check_format(name: str) -> None:
    """Raise `UsageError` for an unknown format, before any work is done."""
    from lorasmith.gates.formats import FORMATS

    if name != "text" and name not in FORMATS:
        raise UsageError(f"there is no format {name!r}", expected=f"text, {', '.join(FORMATS)}")


def print_gates(record: GateRecord, name: str) -> None:
    """`github` also appends the table to the job's summary, where GitHub names a file for it."""
    from lorasmith.cli import views
    from lorasmith.cli.console import console
    from lorasmith.gates.formats import FORMATS, to_markdown

    check_format(name)
    if name == "text":
        views.show_gates(record, console())
        return
    sys.stdout.write(FORMATS[name](record))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if name == "github" and summary:
        with os_errors(summary, "write the job summary"), Path(summary).open("a", encoding="utf-8") as file:
            file.write(to_markdown(record))
