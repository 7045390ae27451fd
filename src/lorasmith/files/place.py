"""May a command write its folder here? Asked before the work: a finished folder replaces what is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasmith.errors import UsageError, os_errors


def require_own_place(output: Path, record: str, inputs: Sequence[Path]) -> None:
    """Raise `UsageError` unless `output` is new, empty, or a folder with the record that the command leaves.

    Nor may it be an input, lie in one or hold one.
    """
    require_outside(output, inputs)
    if holds_another(output, record):
        raise UsageError(
            "the output folder holds something that this command did not write",
            where=output,
            expected=f"a new place, or a folder with {record}, which is replaced",
            remedy="choose another folder, or remove this one",
        )


def require_outside(output: Path, inputs: Sequence[Path]) -> None:
    """Raise `UsageError` where the output is, lies in or holds an input: these are never written to."""
    place = output.resolve()
    for folder in inputs:
        given = folder.resolve()
        if place == given or given in place.parents or place in given.parents:
            raise UsageError(
                f"the output is, lies in or holds the input {folder}",
                where=output,
                remedy="choose another output folder",
            )


def holds_another(output: Path, mark: str) -> bool:
    """Whether there is a folder with content but without the file `mark`; `UsageError` for a file."""
    with os_errors(output, "look into"):
        if output.exists() and not output.is_dir():
            raise UsageError("the output is a file", where=output, expected="a folder, or nothing yet")
        return output.is_dir() and any(output.iterdir()) and not (output / mark).is_file()
