"""A run folder against its own records: every output whose hash a record names is read again."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from lorasmith.errors import LorasmithError
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import hash_file
from lorasmith.progress import Progress
from lorasmith.records.base import Finding, Record
from lorasmith.records.merging import MergeRecord
from lorasmith.records.release import StageRecord
from lorasmith.records.scoring import TaskResult, ValidationResult

R = TypeVar("R", bound=Record)


def check_run(run: Path, progress: Progress) -> list[Finding]:
    """Findings for outputs that are missing or not what the records say; a package inside is left out."""
    expected, findings = _expected(run)
    total = sum((run / name).stat().st_size for name in expected if (run / name).is_file())
    with progress("Verify", total=total, unit="B") as advance:
        for name, named in sorted(expected.items()):
            path = run / name
            if not path.is_file():
                findings.append(_finding("missing-file", f"{name} is missing", name))
                continue
            found = hash_file(path)
            for source, sha in sorted(named.items()):
                if found != sha:
                    message = f"{name} is not what {source} says"
                    findings.append(_finding("damaged-file", message, name, f"SHA-256 {sha}, found {found}"))
            advance(path.stat().st_size)
    return findings


def _expected(run: Path) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """File → record that names it → SHA-256; and records that cannot be read."""
    expected: dict[str, dict[str, str]] = {}
    findings: list[Finding] = []

    def name(file: str, source: Path, sha256: str) -> None:
        expected.setdefault(file, {})[source.relative_to(run).as_posix()] = sha256

    for path in sorted((run / "stages").glob("*.json")):
        stage = _read(path, StageRecord, findings)
        for output in stage.outputs if stage and stage.stage != "package" else []:
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
