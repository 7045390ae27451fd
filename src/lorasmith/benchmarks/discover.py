"""Find which file of a folder holds which benchmark, by content, and read all its usable rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lorasmith.benchmarks import foreign
from lorasmith.benchmarks.base import Benchmark, Item, RowError, SourceRow
from lorasmith.benchmarks.tables import kind_of, read_table
from lorasmith.errors import DataError, os_errors
from lorasmith.files import sniff
from lorasmith.records.base import Finding
from lorasmith.records.dataset import RejectedRow

_PEEK_ROWS = 50
"""So many rows decide what a file holds; each further row is still checked by itself."""
_SPLITS = ("test", "validation", "unnamed", "train")
_SPLIT_WORDS = {"test": "test", "dev": "validation", "val": "validation", "validation": "validation"}


@dataclass(frozen=True)
class Candidate:
    """A usable row with what its benchmark makes of it."""

    row: SourceRow
    item: Item


@dataclass
class Found:
    """All that a folder held."""

    candidates: dict[str, list[Candidate]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)


def read_folder(root: Path, known: Sequence[Benchmark], wanted: Sequence[Benchmark], *, seed: int) -> Found:
    """Read the wanted benchmarks from all tables below `root` (or from the file `root`).

    Rows come from the best split that is there: test, else validation, else files that name no split, else
    train. Raises `DataError` when there is no table at all; everything else is a finding.
    """
    found = Found()
    files = _tables(root)
    holders: dict[str, list[tuple[str, Path, str]]] = {}
    for path in files:
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        benchmark = _identify(path, name, known, found)
        if benchmark is not None and benchmark in wanted:
            holders.setdefault(benchmark.name, []).append((_split_of(name), path, name))
    for benchmark in wanted:
        chosen = _best_split(benchmark, holders.get(benchmark.name, []), found)
        rows = [candidate for path, name in chosen for candidate in _read(path, name, benchmark, seed, found)]
        if benchmark.graded and rows and not any(candidate.item.native for candidate in rows):
            _report_ungraded(benchmark, rows, found)
        found.candidates[benchmark.name] = rows
    return found


def _tables(root: Path) -> list[Path]:
    with os_errors(root, "read the benchmarks"):
        root.stat()
        paths = [root] if root.is_file() else root.rglob("*")
        files = [
            path
            for path in paths
            if kind_of(path)
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        ]
    if not files:
        raise DataError(
            "there are no benchmark files here",
            where=root,
            expected="files or folders with .jsonl, .json, .csv or .parquet, gzipped or not",
            remedy="run `lorasmith benchmarks fetch`, or give the folder that holds your copies",
        )
    return sorted(files, key=lambda path: path.as_posix())


def _identify(path: Path, name: str, known: Sequence[Benchmark], found: Found) -> Benchmark | None:
    """The benchmark most of the first rows belong to; every other outcome becomes a finding."""
    try:
        if kind_of(path) != ".parquet":
            fault = sniff.wrong_content(sniff.head(path))
            if fault is not None:
                _report(found, "error", fault.code, fault.found, name, fault.remedy)
                return None
        rows = list(islice(read_table(path, name, lambda document: _unpack(document, known)), _PEEK_ROWS))
    except DataError as error:
        place = error.where.replace(str(path), name) if error.where else name
        _report(found, "error", "unreadable", error.found, place, error.remedy, error.expected)
        return None
    votes = Counter(benchmark.name for row in rows for benchmark in known if benchmark.recognises(row))
    claimed = _claimed_by_name(name, known)
    if not votes:
        _report_unknown(found, rows, name, claimed)
        return None
    winner = next(benchmark for benchmark in known if benchmark.name == votes.most_common(1)[0][0])
    if claimed is not None and claimed is not winner:
        _report(
            found, "error", "wrong-content", f"the name says {claimed.name}, the rows are {winner.name}",
            name, "rename or replace the file", f"rows of {claimed.name}",
        )  # fmt: skip
        return None
    return winner


def _report_unknown(found: Found, rows: list[SourceRow], name: str, claimed: Benchmark | None) -> None:
    what = foreign.name_of(rows)
    if what == foreign.OWN_OUTPUT:
        _report(found, "note", "own-output", "this is lorasmith's own output and was passed over", name)
    elif claimed is None and what is None:
        _report(found, "warning", "unrecognised", "the rows are of no known benchmark", name)
    else:
        holds = "no rows" if not rows else f"rows of {what}" if what else "rows with other fields"
        wanted = f"rows of {claimed.name}" if claimed else "a benchmark that lorasmith knows"
        severity = "error" if claimed else "warning"
        _report(
            found, severity, "wrong-content", f"the file holds {holds}", name,
            "replace the file with the published one", wanted,
        )  # fmt: skip


def _read(path: Path, name: str, benchmark: Benchmark, seed: int, found: Found) -> Iterator[Candidate]:
    """The usable rows of one file; a file that breaks off is rejected as a whole."""
    candidates: list[Candidate] = []
    rejected: list[RejectedRow] = []
    try:
        for row in read_table(path, name, benchmark.unpack):
            try:
                if row.problem:
                    raise RowError(row.problem)
                if not benchmark.recognises(row):
                    raise RowError(f"the fields are not those of {benchmark.name}")
                candidates.append(Candidate(row, benchmark.read(row, seed=seed)))
            except RowError as error:
                rejected.append(reject(benchmark.name, row, str(error)))
    except DataError as error:
        place = error.where.replace(str(path), name) if error.where else name
        _report(found, "error", "unreadable", error.found, place, error.remedy, error.expected)
        return iter(())
    found.rejected += rejected
    for reason, count in sorted(Counter(row.reason for row in rejected).items()):
        first = next(row.row for row in rejected if row.reason == reason)
        everywhere = "every row is" if not candidates and count == len(rejected) else f"{count} rows are"
        _report(
            found, "error", "rejected-rows", f"{everywhere} unusable: {reason}", f"{name}:{first}",
            "mend or replace the file; --no-strict goes on without these rows", f"rows of {benchmark.name}",
        )  # fmt: skip
    return iter(candidates)


def reject(benchmark: str, row: SourceRow, reason: str) -> RejectedRow:
    """The record of a row that is left out."""
    return RejectedRow(benchmark=benchmark, file=row.file, row=row.number, reason=reason, sha256=row.sha256)


def _report_ungraded(benchmark: Benchmark, rows: Sequence[Candidate], found: Found) -> None:
    field_name = rows[0].item.native_field
    message = f"the field {field_name!r} is empty in all {len(rows)} rows of {benchmark.name}"
    _report(
        found, "error", "no-difficulty", message, rows[0].row.file,
        "use the published file; --no-strict goes on, and the guide's policy then calls every row hard",
        "a difficulty in the rows",
    )  # fmt: skip


def _best_split(
    benchmark: Benchmark, holders: list[tuple[str, Path, str]], found: Found
) -> list[tuple[Path, str]]:
    splits = {split for split, _, _ in holders}
    if not splits:
        return []
    best = min(splits, key=_SPLITS.index)
    others = sorted(splits - {best}, key=_SPLITS.index)
    if others:
        message = f"{benchmark.name} is taken from its {best} files; not used: {', '.join(others)}"
        _report(found, "note", "split-chosen", message)
    if best == "train":
        message = f"only the training split of {benchmark.name} is here: models have often seen it"
        _report(found, "warning", "train-split", message, holders[0][2], "add the test split")
    return [(path, name) for split, path, name in holders if split == best]


def _split_of(name: str) -> str:
    """The split that the path names: the file's own first or last word, else the nearest folder."""
    *folders, stem = name.lower().split("/")
    words = re.split(r"[^a-z]+", stem.split(".")[0])
    for word in (words[-1], words[0], *words[1:-1][::-1], *reversed(folders)):
        for start, split in (("train", "train"), ("auxiliary", "train"), *_SPLIT_WORDS.items()):
            if word == start or (split == "train" and word.startswith(start)):
                return split
    return "unnamed"


def _claimed_by_name(name: str, known: Iterable[Benchmark]) -> Benchmark | None:
    """The benchmark whose name is a word of the file's own name, such as `gpqa_diamond.csv`."""
    words = re.split(r"[^a-z0-9]+", name.rsplit("/", 1)[-1].lower())
    for benchmark in known:
        own = benchmark.name.lower()
        if any(word == own or (word.startswith(own) and word[len(own) :].isdigit()) for word in words):
            return benchmark
    return None


def _unpack(document: Any, known: Iterable[Benchmark]) -> Iterable[dict[str, Any]] | None:
    for benchmark in known:
        rows = benchmark.unpack(document)
        if rows is not None:
            return rows
    return None


def _report(
    found: Found,
    severity: str,
    code: str,
    message: str,
    where: str | None = None,
    remedy: str | None = None,
    expected: str | None = None,
) -> None:
    found.findings.append(
        Finding(severity=severity, code=code, message=message, where=where, expected=expected, remedy=remedy)
    )
