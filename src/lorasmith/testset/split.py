"""Hold out a stratified test set from a training file, streaming; the training file stays as it is."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorasmith.data.files import is_lines
from lorasmith.data.rows import iterate_rows
from lorasmith.data.sources import local_rows
from lorasmith.errors import DataError, UsageError, os_errors
from lorasmith.files import jsonl
from lorasmith.files.atomic import atomic_file, read_record, write_record
from lorasmith.files.jsonl import read_lines, write_examples
from lorasmith.files.output_folder import require_own_record
from lorasmith.machine.resources import require_disk
from lorasmith.options import SplitOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.dataset import SplitRecord
from lorasmith.testset.rows import digest, require_own_rows, to_example
from lorasmith.testset.sampling import Choice, Reservoir, allocate, scan

INDEPENDENCE = (
    "a hold-out is independent only if the training has not seen it: a model that was trained on this file "
    "before the split has seen every row of it"
)


@documented(SplitOptions)
def split(
    train: Path,
    output: Path,
    *,
    options: SplitOptions | None = None,
    progress: Progress = silent,
    **given: Any,
) -> SplitRecord:
    """Write exactly `size` rows of `train` (JSONL) to `output`, and `split.json` beside it.

    Strata are the combinations of the `stratify_by` fields; shares follow the method of largest remainders,
    and a stratum with two rows or more keeps at least one where `size` allows. Rows with one prompt count
    as one: the hold-out gets one of them. With `remove` all of them leave the training file, which is
    replaced atomically and kept as `NAME.bak` unless `backup` is off. A repeated command finds its own
    result and changes nothing.

    Raises `UsageError` for a wrong size or paths, `DataError` for unusable rows or too few of them.
    """
    asked = SplitOptions.given(options, given)
    size, seed, remove = asked.size, asked.seed, asked.remove
    given_file, train = train, local_rows(train, asked)
    if remove and (train != given_file or not is_lines(train)):
        raise UsageError(
            "rows can only be taken out of a file with one row a line",
            where=train,
            expected="JSONL, as it is or packed by gzip",
            remedy="leave --remove out, or convert the file to JSONL first",
        )
    fields = [name for name in asked.stratify_by if name]
    with os_errors(train, "read"):
        if output.exists() and output.samefile(train):
            raise UsageError("the output is the training file itself", where=output, expected="another path")
        before = train.stat()
    require_own_rows(output)
    require_own_record(_record_path(output))
    file = digest(train)
    done = _finished(output, file, size, fields, seed)
    if done is not None:
        return done
    with progress("Scan training rows", total=before.st_size, unit="B") as advance:
        reservoir = scan(train, fields, size, seed, advance)
    chosen, shares = _choose(reservoir, train, size, seed)
    _write_test(train, output, chosen)
    if train.stat().st_mtime_ns != before.st_mtime_ns or train.stat().st_size != before.st_size:
        raise DataError("the training file changed while it was read", where=train, remedy="split again")
    shared = reservoir.rows_sharing(chosen)
    record = SplitRecord(
        train=file,
        test=digest(output),
        size=size,
        seed=seed,
        stratify_by=fields,
        strata={name: {"rows": reservoir.rows[name], "held_out": shares[name]} for name in sorted(shares)},
        removed_from_train=remove,
        findings=_findings(reservoir, fields, shares, len(shared) - size, remove),
    )
    if remove:
        record = _remove(train, shared, record, asked.backup, output)
    else:
        write_record(_record_path(output), record)
    return record


def _record_path(output: Path) -> Path:
    return output.parent / "split.json"


def _finished(output: Path, train: FileDigest, size: int, fields: list[str], seed: int) -> SplitRecord | None:
    """The record of an earlier split that has already removed its rows from this very file."""
    path = _record_path(output)
    if not (path.is_file() and output.is_file()):
        return None
    record = read_record(path, SplitRecord)
    if record.train_after is None or record.train_after.sha256 != train.sha256:
        return None
    same = (record.size, record.stratify_by, record.seed) == (size, fields, seed)
    if same and digest(output) == record.test:
        return record
    raise DataError(
        "a hold-out with other settings has already been removed from this training file",
        where=path,
        remedy=f"give another output, or restore the training file from {record.backup or 'your own copy'}",
    )


def _choose(reservoir: Reservoir, train: Path, size: int, seed: int) -> tuple[list[Choice], dict[str, int]]:
    candidates = reservoir.candidates()
    available = sum(len(rows) for rows in candidates.values())
    total = sum(reservoir.rows.values())
    if available < size or total <= size:
        distinct = "" if total <= size else f" with {available} different prompts"
        raise DataError(
            f"{size} rows were asked for and the file has {total}{distinct}",
            where=train,
            expected="more rows than are held out",
            remedy="ask for a smaller size",
        )
    keep = {name: 1 for name, rows in reservoir.rows.items() if rows >= 2}
    limits = {name: len(rows) for name, rows in candidates.items()}
    shares = allocate(reservoir.rows, size, seed, at_least=keep, at_most=limits)
    chosen = [choice for name, rows in candidates.items() for choice in rows[: shares[name]]]
    return sorted(chosen), shares


def _write_test(train: Path, output: Path, chosen: Iterable[Choice]) -> None:
    """Fetch the chosen lines and write them in the order of their hashes, which no file order changes."""
    places = {choice.line: choice.key for choice in chosen}
    examples = []
    for row in iterate_rows(train):
        if row.number in places:
            examples.append((places[row.number], to_example(row, train)))
    write_examples(output, (example for _, example in sorted(examples, key=lambda pair: pair[0])))


def _findings(
    reservoir: Reservoir, fields: list[str], shares: dict[str, int], copies: int, remove: bool
) -> list[Finding]:
    findings = [Finding(severity="warning", code="hold-out-independence", message=INDEPENDENCE)]
    for name in fields:
        if name in reservoir.absent:
            message = f"no row has a field {name!r}: all rows count as one group of it"
            findings.append(Finding(severity="warning", code="no-such-field", message=message))
    lost = sorted(name for name, share in shares.items() if share == 0)
    if lost:
        listed = "; ".join(lost[:10]) + (" …" if len(lost) > 10 else "")
        message = f"{len(lost)} rare strata have no row in the hold-out: {listed}"
        findings.append(Finding(severity="warning", code="rare-strata", message=message))
    if copies:
        what = (
            "were removed as well" if remove else "stay in the training file: the hold-out is not independent"
        )
        message = f"{copies} further training rows have a prompt that was held out; they {what}"
        severity = "note" if remove else "warning"
        findings.append(Finding(severity=severity, code="repeated-prompts", message=message))
    return findings


def _remove(train: Path, lines: set[int], record: SplitRecord, backup: bool, output: Path) -> SplitRecord:
    """Replace the training file by one without `lines`; the record is written before the rename.

    A kill between the two leaves the old training file, whose digest the record does not match: the same
    command then starts again and ends with the same bytes.
    """
    require_disk(train.parent, train.stat().st_size, "rewrite the training file")
    saved = _backup(train) if backup else None
    packed = jsonl.is_gzip(train)
    with atomic_file(train.with_name(f".{train.name}.split")) as handle:
        target = gzip.GzipFile(filename="", mode="wb", fileobj=handle, mtime=0) if packed else handle
        for number, line in read_lines(train, "one JSON object a line"):
            if number not in lines:
                target.write(line)
        if packed:
            target.close()
    rest = train.with_name(f".{train.name}.split")
    after = digest(rest).model_copy(update={"path": train.name})
    update = {"train_after": after, "backup": saved, "rows_removed": len(lines)}
    record = record.model_copy(update=update)
    write_record(_record_path(output), record)
    with os_errors(train, "replace"):
        rest.replace(train)
    return record


def _backup(train: Path) -> str:
    """Keep the file under a free name; a hard link costs no space, and the original is never edited."""
    number = 0
    while (saved := train.with_name(f"{train.name}.bak{number or ''}")).exists():
        if saved.stat().st_size == train.stat().st_size and digest(saved).sha256 == digest(train).sha256:
            return saved.name
        number += 1
    with os_errors(saved, "write the backup"):
        try:
            os.link(train, saved)
        except OSError:
            shutil.copy2(train, saved)
    return saved.name
