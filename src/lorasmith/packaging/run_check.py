"""A run folder against its list of checksums and its own records: every file is read again."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TypeVar

from lorasmith.errors import LorasmithError
from lorasmith.files.atomic import read_record
from lorasmith.files.checksums import SUMS, read_sums, walk
from lorasmith.files.digests import hash_file
from lorasmith.files.seal import LOCK, sealed_names
from lorasmith.packaging.signing import SIGNATURE
from lorasmith.progress import Progress
from lorasmith.records.base import Finding, Record
from lorasmith.records.merging import MergeRecord
from lorasmith.records.release import StageRecord
from lorasmith.records.scoring import TaskResult, ValidationResult

R = TypeVar("R", bound=Record)

PACKAGE = "package"
"""Below the run folder; whoever checks the run checks it as a package."""
_ENTRANCE = (f"{PACKAGE}/{SUMS}", f"{PACKAGE}/{SIGNATURE}")
"""What all other files of a package are checked against is checked with the run."""


def is_run(folder: Path) -> bool:
    """Whether this is a run folder, also one that lost its `run.json` or its list of checksums."""
    return (folder / "run.json").is_file() or (folder / "stages").is_dir()


def check_run(run: Path, progress: Progress) -> list[Finding]:
    """Findings for files that are missing, added, or not what the list or the records say.

    The archives of a package inside are left out.
    """
    expected, findings = _expected(run)
    findings += _check_list(run, expected)
    found = walk(run)
    lock = found.get(LOCK)
    if lock is not None and (lock.st_size or not stat.S_ISREG(lock.st_mode)):
        findings.append(_finding("damaged-file", f"{LOCK} is not empty", LOCK))
    total = sum(found[name].st_size for name in expected if name in found)
    with progress("Verify", total=total, unit="B") as advance:
        for name, named in sorted(expected.items()):
            if name not in found:
                findings.append(_finding("missing-file", f"{name} is missing", name))
                continue
            if not stat.S_ISREG(found[name].st_mode):
                findings.append(_finding("not-a-file", f"{name} is a link or a device", name))
                continue
            sha = hash_file(run / name)
            for source, wanted in sorted(named.items()):
                if sha != wanted:
                    message = f"{name} is not what {source} says"
                    findings.append(_finding("damaged-file", message, name, f"SHA-256 {wanted}, found {sha}"))
            advance(found[name].st_size)
    return findings


def _check_list(run: Path, expected: dict[str, dict[str, str]]) -> list[Finding]:
    """Adds what `SHA256SUMS` says to `expected`; findings for files that it does not list."""
    if not (run / SUMS).is_file():
        missing = _finding("not-sealed", f"the run has no {SUMS}: it did not end, or lost it", str(run), SUMS)
        return [missing.model_copy(update={"remedy": "give the command of the run again"})]
    try:
        listed = read_sums(run)
    except LorasmithError as error:
        return [_finding("damaged-file", error.found, SUMS, error.expected)]
    for name, sha in listed.items():
        if not name.startswith(f"{PACKAGE}/") or name in _ENTRANCE:
            expected.setdefault(name, {})[SUMS] = sha
    extra = [name for name in sealed_names(run) if name not in listed and not name.startswith(f"{PACKAGE}/")]
    findings = [_finding("extra-file", f"{name} does not belong here", name) for name in extra]
    if not (run / PACKAGE).is_dir() and any(name.startswith(f"{PACKAGE}/") for name in listed):
        findings.append(_finding("missing-file", f"the folder {PACKAGE} is missing", PACKAGE))
    return findings


def _expected(run: Path) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """File → record that names it → SHA-256; and records that cannot be read."""
    expected: dict[str, dict[str, str]] = {}
    findings: list[Finding] = []

    def name(file: str, source: Path, sha256: str) -> None:
        expected.setdefault(file, {})[source.relative_to(run).as_posix()] = sha256

    for path in sorted((run / "stages").glob("*.json")):
        stage = _read(path, StageRecord, findings)
        for output in stage.outputs if stage and stage.stage != PACKAGE else []:
            name(output.path, path, output.sha256)
    for path in sorted((run / "validation").glob("*.json")):
        kind: type[TaskResult | ValidationResult] = (
            TaskResult if path.stem.endswith("_tasks") else ValidationResult
        )
        result = _read(path, kind, findings)
        if result:
            name(f"validation/{result.per_example.path}", path, result.per_example.sha256)
            name("testset/test_set.jsonl", path, result.test_set.sha256)
    path = run / "merged" / "lorasmith_merge.json"
    merge = _read(path, MergeRecord, findings) if path.is_file() else None
    for file in merge.files if merge else []:
        name(f"merged/{file.path}", path, file.sha256)
    return expected, findings


def _read(path: Path, kind: type[R], findings: list[Finding]) -> R | None:
    try:
        return read_record(path, kind)
    except LorasmithError as error:
        findings.append(_finding("damaged-record", error.found, str(path), error.expected))
        return None


def _finding(code: str, message: str, where: str, expected: str | None = None) -> Finding:
    return Finding(severity="error", code=code, message=message, where=where, expected=expected)
