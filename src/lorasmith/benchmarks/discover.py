"""Find which file of a folder holds which benchmark, by content, and read all its usable rows."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lorasmith.benchmarks.base import Benchmark, Item, NotForTests, RowError, SourceRow
from lorasmith.errors import DataError, os_errors
from lorasmith.files import jsonl
from lorasmith.files.inputs import open_input
from lorasmith.files.jsonl import MAX_LINE_BYTES, load_json, open_text, read_lines, read_rows
from lorasmith.parsing import parse_json
from lorasmith.records.base import Finding
from lorasmith.records.dataset import RejectedRow


def _is_own(row: SourceRow) -> bool:
    """Whether it is of our own test sets or records, which often lie beside the benchmarks."""
    value = row.value
    if str(value.get("format", "")).startswith("lorasmith/"):
        return True
    metadata = value.get("metadata")
    return {"id", "prompt", "response"} <= value.keys() and isinstance(metadata, dict)


# Rows out of any file: JSONL, JSON, CSV with or without a header, Parquet; text may be gzipped.


KINDS = (".jsonl", ".json", ".csv", ".parquet")
MAX_DOCUMENT_BYTES = 512 << 20
"""A JSON document is parsed as a whole; the largest public one (DROP's training set) has 105 MB."""

Unpack = Callable[[Any], Iterable[dict[str, Any]] | None]


def kind_of(path: Path) -> str | None:
    """The suffix that tells the format, without `.gz`; None for a file that is no table."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] == ".gz":
        suffixes = suffixes[:-1]
    return suffixes[-1].lower() if suffixes and suffixes[-1].lower() in KINDS else None


def read_table(path: Path, name: str, unpack: Unpack) -> Iterator[SourceRow]:
    """The rows of a file with their numbers from 1; `name` is how the file is called in messages.

    A JSON document is given to `unpack` first. Raises `DataError` for a file that cannot be read to its end.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _parquet(path, name)
    elif kind == ".csv":
        yield from _csv(path, name)
    elif kind == ".json" and not _is_jsonl(path):
        yield from _json(path, name, unpack)
    else:
        yield from (SourceRow(name, number, row) for number, row in read_rows(path))


def _is_jsonl(path: Path) -> bool:
    """Many `.json` files of the hub hold one object a line: then the first line is a whole object."""
    jsonl.require_text(path, "JSON")
    with open_text(path) as handle:
        first = handle.readline(MAX_LINE_BYTES)
        more = handle.readline(MAX_LINE_BYTES)
    try:
        return isinstance(parse_json(first), dict) and bool(more.strip())
    except ValueError:
        return False


def _json(path: Path, name: str, unpack: Unpack) -> Iterator[SourceRow]:
    with open_text(path) as handle:
        content = handle.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"the document is larger than {MAX_DOCUMENT_BYTES >> 20} MiB",
            where=path,
            remedy="convert it to JSONL, which is read row by row",
        )
    try:
        document = load_json(content)
    except ValueError as error:
        raise DataError(
            f"this is not JSON, or it is cut off ({type(error).__name__})",
            where=path,
            expected="a JSON document in UTF-8",
            remedy="download it again",
        ) from error
    rows = unpack(document)
    if rows is None:
        rows = document if isinstance(document, list) else [document]
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield SourceRow(name, number, row)
        else:
            yield SourceRow(name, number, {}, f"a JSON {type(row).__name__} in place of an object")


def _csv(path: Path, name: str) -> Iterator[SourceRow]:
    reader = csv.reader(_decoded(path), strict=True)
    header: list[str] | None = None
    try:
        for number, cells in enumerate(reader, 1):
            if number == 1 and not _has_no_header(cells):
                header = [cell.strip() for cell in cells]
            elif cells:
                yield _csv_row(name, number, header, cells)
    except csv.Error as error:
        raise DataError(
            f"the CSV is damaged: {error}",
            where=f"{path}:{reader.line_num}",
            expected="every quote closed",
            remedy="download it again, or mend the quotes",
        ) from error


def _csv_row(name: str, number: int, header: list[str] | None, cells: list[str]) -> SourceRow:
    keys = header or [str(index) for index in range(len(cells))]
    problem = ""
    if len(keys) != len(cells):
        problem = f"the row has {len(cells)} columns and the header {len(keys)}"
    return SourceRow(name, number, dict(zip(keys, cells, strict=False)), problem)


def _has_no_header(cells: list[str]) -> bool:
    """Question, four choices and a letter: the only public layout without a header (MMLU)."""
    return len(cells) == 6 and cells[5].strip() in ("A", "B", "C", "D")


def _decoded(path: Path) -> Iterator[str]:
    """The lines as text, their ends kept: a quoted cell may hold line ends."""
    for number, line in read_lines(path, "CSV"):
        try:
            decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                "this line is not UTF-8 text", where=f"{path}:{number}", remedy="convert the file to UTF-8"
            ) from error
        if "\x00" in decoded:
            raise DataError("there is a NUL byte in this line", where=f"{path}:{number}", expected="CSV")
        yield decoded


def _parquet(path: Path, name: str) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fault = jsonl.wrong_content(jsonl.head(path)) if not _is_parquet(path) else None
    if fault is not None and fault.code != "nul-bytes":
        raise DataError(fault.found, where=path, expected="Parquet", remedy=fault.remedy)
    try:
        with os_errors(path, "read"), pq.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield SourceRow(name, number, row)
    except pa.ArrowException as error:
        raise DataError(
            "this is not Parquet, or it is damaged or cut off", where=path, remedy="download it again"
        ) from error


def _is_parquet(path: Path) -> bool:
    with os_errors(path, "read"), open_input(path) as handle:
        return handle.read(4) == b"PAR1"


_PEEK_ROWS = 50
"""So many rows decide what a file holds; each further row is still checked by itself."""
_SPLIT_WORDS = {"test": "test", "dev": "validation", "val": "validation", "validation": "validation"}


@dataclass(frozen=True)
class Candidate:
    """A usable row with what its benchmark makes of it."""

    row: SourceRow
    item: Item


@dataclass
class FolderContents:
    """All that a folder held."""

    candidates: dict[str, list[Candidate]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)
    unwanted: dict[str, list[str]] = field(default_factory=dict)
    """Benchmark that was not asked for → the files that hold it."""


def read_folder(
    root: Path, known: Sequence[Benchmark], wanted: Sequence[Benchmark], *, seed: int
) -> FolderContents:
    """Read the wanted benchmarks from all tables below `root` (or from the file `root`).

    Rows come from the best split that is there, in the benchmark's own order: as a rule test, else
    validation, else files that name no split, else train. Raises `DataError` when there is no table at all;
    everything else is a finding.
    """
    contents = FolderContents()
    files = _tables(root)
    holders: dict[str, list[tuple[str, Path, str]]] = {}
    strangers: dict[str, _Strangers] = {}
    for path in files:
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        benchmark = _identify(path, name, known, contents, strangers)
        if benchmark is None:
            continue
        if benchmark not in wanted:
            contents.unwanted.setdefault(benchmark.name, []).append(name)
        else:
            holders.setdefault(benchmark.name, []).append((_split_of(name), path, name))
    for found in strangers.values():
        _report_strangers(contents, found, holders.keys() | contents.unwanted.keys())
    for benchmark in wanted:
        chosen = _best_split(benchmark, holders.get(benchmark.name, []), contents)
        rows = _read(chosen, benchmark, seed, contents)
        if benchmark.graded and rows and not any(candidate.item.native for candidate in rows):
            _report_ungraded(benchmark, rows, contents)
        contents.candidates[benchmark.name] = rows
    return contents


@dataclass
class _Strangers:
    """Files whose rows are not those of the benchmark that their names say, or of none; told together."""

    claimed: Benchmark | None
    by_folder: bool
    """Whether a folder says so, and not the files' own names."""
    known: bool
    """Whether the rows are of another benchmark."""
    holds: str
    """Its name, else what the first of the files holds."""
    files: list[str] = field(default_factory=list)


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


def _identify(
    path: Path,
    name: str,
    known: Sequence[Benchmark],
    contents: FolderContents,
    strangers: dict[str, _Strangers],
) -> Benchmark | None:
    """The benchmark most of the first rows belong to; every other outcome becomes a finding."""
    try:
        if kind_of(path) != ".parquet":
            fault = jsonl.wrong_content(jsonl.head(path))
            if fault is not None:
                _report(contents, "error", fault.code, fault.found, name, fault.remedy)
                return None
        rows = list(islice(read_table(path, name, lambda document: _unpack(document, known)), _PEEK_ROWS))
    except DataError as error:
        place = error.where.replace(str(path), name) if error.where else name
        _report(contents, "error", "unreadable", error.found, place, error.remedy, error.expected)
        return None
    if rows and all(_is_own(row) for row in rows):
        _report(contents, "note", "own-output", "this is lorasmith's own output and was passed over", name)
        return None
    votes = Counter(benchmark.name for row in rows for benchmark in known if benchmark.recognises(row))
    winner = next(
        (benchmark for benchmark in known if votes and benchmark.name == votes.most_common(1)[0][0]), None
    )
    by_name, by_folder = _claimed_by_name(name, known), _claimed_by_folder(name, known)
    claimed = by_name or by_folder
    if winner is not None and claimed in (None, winner):
        return winner
    holds = winner.name if winner is not None else _columns_seen(rows)
    kind = f"{claimed and claimed.name} {by_name is None} {winner and winner.name}"
    strangers.setdefault(kind, _Strangers(claimed, by_name is None, winner is not None, holds)).files.append(
        name
    )
    return None


_SHOWN_COLUMNS, _SHOWN_SIGNS = 12, 40


def _columns_seen(rows: list[SourceRow]) -> str:
    """What a message says of the fields; of a table without a header they are a row, which is not quoted."""
    names = [str(name) for name in rows[0].value] if rows else []
    if not names:
        return "no rows" if not rows else "rows without fields"
    if any(len(name) > _SHOWN_SIGNS for name in names):
        return f"rows of {len(names)} columns, without names in the first line"
    more = f", … ({len(names)} columns)" if len(names) > _SHOWN_COLUMNS else ""
    return f"rows with other columns: {', '.join(sorted(names)[:_SHOWN_COLUMNS])}{more}"


def _report_strangers(contents: FolderContents, found: _Strangers, present: Iterable[str]) -> None:
    """Once for all files of a kind: what they hold, and which columns were wanted."""
    count = len(found.files)
    which = f"{count} files hold" if count > 1 else "the file holds"
    holds = found.holds
    if found.known and found.claimed is not None:
        place = "folder" if found.by_folder else "name"
        everywhere = f", in {count} files" if count > 1 else ""
        message = f"the {place} says {found.claimed.name}, the rows are {holds}{everywhere}"
    elif found.claimed is None:
        message = f"{which} rows of no known benchmark: {holds}"
    else:
        message = f"{which} {holds}"
    # What lies beside a benchmark's own files in its folder, such as an index of subjects, is no wrong copy.
    beside = found.by_folder and found.claimed is not None and found.claimed.name in present
    if found.claimed is None or (beside and not found.known):
        _report(contents, "warning", "unrecognised", message, found.files[0])
    else:
        _report(
            contents, "error", "wrong-content", message, found.files[0],
            "give the published files, or rename them if they are something else",
            f"rows of {found.claimed.name}: {found.claimed.columns}",
        )  # fmt: skip


def _read(
    files: Sequence[tuple[Path, str]], benchmark: Benchmark, seed: int, contents: FolderContents
) -> list[Candidate]:
    """The usable rows of a benchmark's files; a file that breaks off is rejected as a whole."""
    candidates: list[Candidate] = []
    rejected: list[RejectedRow] = []
    kept_out: list[RejectedRow] = []
    for path, name in files:
        try:
            used, unusable, others = _read_file(path, name, benchmark, seed)
        except DataError as error:
            place = error.where.replace(str(path), name) if error.where else name
            _report(contents, "error", "unreadable", error.found, place, error.remedy, error.expected)
            continue
        candidates += used
        rejected += unusable
        kept_out += others
    contents.rejected += rejected + kept_out
    for reason, rows in _by_reason(kept_out):
        message = f"{len(rows)} rows are left out: {reason}"
        _report(contents, "note", "not-for-tests", message, rows[0].file)
    for reason, rows in _by_reason(rejected):
        everywhere = (
            "every row is" if not candidates and len(rows) == len(rejected) else f"{len(rows)} rows are"
        )
        holders = len({row.file for row in rows})
        _report(
            contents, "error", "rejected-rows",
            f"{everywhere} unusable{f', in {holders} files' if holders > 1 else ''}: {reason}",
            f"{rows[0].file}:{rows[0].row}",
            "mend or replace the file; --no-strict goes on without these rows",
            f"rows of {benchmark.name}: {benchmark.columns}",
        )  # fmt: skip
    return candidates


def _read_file(
    path: Path, name: str, benchmark: Benchmark, seed: int
) -> tuple[list[Candidate], list[RejectedRow], list[RejectedRow]]:
    """The usable rows of a file, those that are not, and those that are not for tests."""
    candidates: list[Candidate] = []
    rejected: list[RejectedRow] = []
    kept_out: list[RejectedRow] = []
    for row in read_table(path, name, benchmark.unpack):
        try:
            if row.problem:
                raise RowError(row.problem)
            if not benchmark.recognises(row):
                raise RowError(f"the fields are not those of {benchmark.name}")
            candidates.append(Candidate(row, benchmark.read(row, seed=seed)))
        except NotForTests as error:
            kept_out.append(reject(benchmark.name, row, str(error)))
        except RowError as error:
            rejected.append(reject(benchmark.name, row, str(error)))
    return candidates, rejected, kept_out


def _by_reason(rows: Sequence[RejectedRow]) -> list[tuple[str, list[RejectedRow]]]:
    return [
        (reason, [row for row in rows if row.reason == reason])
        for reason in sorted({row.reason for row in rows})
    ]


def reject(benchmark: str, row: SourceRow, reason: str) -> RejectedRow:
    """The record of a row that is left out."""
    return RejectedRow(benchmark=benchmark, file=row.file, row=row.number, reason=reason, sha256=row.sha256)


def _report_ungraded(benchmark: Benchmark, rows: Sequence[Candidate], contents: FolderContents) -> None:
    field_name = rows[0].item.native_field
    message = f"the field {field_name!r} is empty in all {len(rows)} rows of {benchmark.name}"
    _report(
        contents, "error", "no-difficulty", message, rows[0].row.file,
        "use the published file; --no-strict goes on, and the guide's policy then calls every row hard",
        "a difficulty in the rows",
    )  # fmt: skip


def _best_split(
    benchmark: Benchmark, holders: list[tuple[str, Path, str]], contents: FolderContents
) -> list[tuple[Path, str]]:
    splits = sorted({split for split, _, _ in holders}, key=benchmark.splits.index)
    if not splits:
        return []
    best, *others = splits
    if others:
        message = f"{benchmark.name} is taken from its {best} files; not used: {', '.join(others)}"
        _report(contents, "note", "split-chosen", message)
    if best == "train":
        message = f"only the training split of {benchmark.name} is here: models have often seen it"
        _report(contents, "warning", "train-split", message, holders[0][2], "add the test split")
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
    """The benchmark that the file's own name says, such as `gpqa_diamond.csv`."""
    words = "-".join(re.split(r"[^a-z0-9]+", name.rsplit("/", 1)[-1].lower()))
    # The longest name first: `mmlu_pro.parquet` says MMLU-Pro, not MMLU.
    for benchmark in sorted(known, key=lambda benchmark: -len(benchmark.name)):
        if re.search(rf"(?:^|-){_pattern(benchmark)}\d*(?:-|$)", words):
            return benchmark
    return None


def _claimed_by_folder(name: str, known: Iterable[Benchmark]) -> Benchmark | None:
    """The benchmark whose name the nearest folder has that is named after one, as in `mmlu/test/law.csv`."""
    for folder in reversed(name.lower().split("/")[:-1]):
        for benchmark in known:
            if re.fullmatch(_pattern(benchmark), re.sub(r"[^a-z0-9]+", "-", folder)):
                return benchmark
    return None


def _pattern(benchmark: Benchmark) -> str:
    return re.escape(benchmark.name.lower()).replace(r"\-", "-?")


def _unpack(document: Any, known: Iterable[Benchmark]) -> Iterable[dict[str, Any]] | None:
    for benchmark in known:
        rows = benchmark.unpack(document)
        if rows is not None:
            return rows
    return None


def _report(
    contents: FolderContents,
    severity: str,
    code: str,
    message: str,
    where: str | None = None,
    remedy: str | None = None,
    expected: str | None = None,
) -> None:
    contents.findings.append(
        Finding(severity=severity, code=code, message=message, where=where, expected=expected, remedy=remedy)
    )
