"""`SHA256SUMS` of a run folder: written when a command has ended, so that any later change is found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorasmith.errors import LorasmithError, os_errors
from lorasmith.files.checksums import SUMS, read_sums, walk, write_sums
from lorasmith.files.digests import describe

LOCK = ".lock"
"""Empty; whoever works on the run holds it open."""


def open_seal(run: Path) -> None:
    """Take the list away before anything below the folder changes: a run without one has not ended."""
    with os_errors(run / SUMS, "write"):
        (run / SUMS).unlink(missing_ok=True)


def seal_run(run: Path) -> None:
    """List every file of the run with its SHA-256; what was hashed as a stage's output is not read again.

    Not equal between two runs: it lists `timing.json` and the page that shows the times.
    """
    write_sums(run, _digests(run, sealed_names(run)))


def reseal(run: Path, changed: Path) -> None:
    """Bring one file or folder of a sealed run up to date; the lines of all others stay as they are.

    Nothing happens for a run that is not sealed, whose list is damaged, or for a place outside of it.
    """
    if not (run / SUMS).is_file() or run.resolve() not in changed.resolve().parents:
        return
    place = changed.resolve().relative_to(run.resolve()).as_posix()
    try:
        known = read_sums(run)
    except LorasmithError:
        return

    def inside(name: str) -> bool:
        return name == place or name.startswith(f"{place}/")

    kept = {name: sha for name, sha in known.items() if not inside(name)}
    write_sums(run, {**kept, **_digests(run, [name for name in sealed_names(run) if inside(name)])})


def sealed_names(run: Path) -> list[str]:
    """All files of a run folder but its list and its lock, links and leftovers included."""
    return sorted(set(walk(run)) - {SUMS, LOCK})


def _digests(run: Path, names: list[str]) -> Mapping[str, str]:
    # A link is no part of a run: it is not listed, and found as what does not belong there.
    files = [run / name for name in names if not (run / name).is_symlink()]
    return {file.path: file.sha256 for file in describe(files, run)}
