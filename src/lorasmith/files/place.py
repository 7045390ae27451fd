"""May a command write its folder here? Asked before the work: a finished folder replaces what is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasmith.errors import UsageError, os_errors


def require_own_place(output: Path, record: str, inputs: Sequence[Path]) -> None:
    """Raise `UsageError` unless `output` is new, empty, or a folder with the record that the command leaves.

    Nor may it be an input, lie in one or hold one: inputs are never written to.
    """
    place = output.resolve()
    for folder in inputs:
        given = folder.resolve()
        if place == given or given in place.parents or place in given.parents:
            raise UsageError(
                f"the output is, lies in or holds the input {folder}",
                where=output,
                remedy="choose another output folder",
            )
    with os_errors(output, "look into"):
        if output.exists() and not output.is_dir():
            raise UsageError("the output is a file", where=output, expected="a folder, or nothing yet")
        if output.is_dir() and any(output.iterdir()) and not (output / record).is_file():
            raise UsageError(
                "the output folder holds something that this command did not write",
                where=output,
                expected=f"a new place, or a folder with {record}, which is replaced",
                remedy="choose another folder, or remove this one",
            )
