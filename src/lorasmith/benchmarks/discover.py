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
    for path in files:
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        benchmark = _identify(path, name, known, contents)
        if benchmark is None:
            continue
        if benchmark not in wanted:
            contents.unwanted.setdefault(benchmark.name, []).append(name)
        else:
            holders.setdefault(benchmark.name, []).append((_split_of(name), path, name))
    for benchmark in wanted:
        chosen = _best_split(benchmark, holders.get(benchmark.name, []), contents)
        rows = [
            candidate for path, name in chosen for candidate in _read(path, name, benchmark, seed, contents)
        ]
        if benchmark.graded and rows and not any(candidate.item.native for candidate in rows):
            _report_ungraded(benchmark, rows, contents)
        contents.candidates[benchmark.name] = rows
    return contents


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
    path: Path, name: str, known: Sequence[Benchmark], contents: FolderContents
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
    votes = Counter(benchmark.name for row in rows for benchmark in known if benchmark.recognises(row))
    claimed = _claimed_by_name(name, known)
    if not votes:
        _report_unknown(contents, rows, name, claimed)
        return None
    winner = next(benchmark for benchmark in known if benchmark.name == votes.most_common(1)[0][0])
    if claimed is not None and claimed is not winner:
        _report(
            contents, "error", "wrong-content", f"the name says {claimed.name}, the rows are {winner.name}",
            name, "rename or replace the file", f"rows of {claimed.name}",
        )  # fmt: skip
        return None
    return winner


def _report_unknown(
    contents: FolderContents, rows: list[SourceRow], name: str, claimed: Benchmark | None
) -> None:
    if rows and all(_is_own(row) for row in rows):
        _report(contents, "note", "own-output", "this is lorasmith's own output and was passed over", name)
    elif claimed is None:
        _report(contents, "warning", "unrecognised", "the rows are of no known benchmark", name)
    else:
        seen = ", ".join(sorted(str(name) for name in rows[0].value)[:12]) if rows else ""
        holds = f"rows with other fields: {seen}" if rows else "no rows"
        _report(
            contents, "error", "wrong-content", f"the file holds {holds}", name,
            "replace the file with the published one", f"rows of {claimed.name}",
        )  # fmt: skip


def _read(
    path: Path, name: str, benchmark: Benchmark, seed: int, contents: FolderContents
) -> Iterator[Candidate]:
    """The usable rows of one file; a file that breaks off is rejected as a whole."""
    candidates: list[Candidate] = []
    rejected: list[RejectedRow] = []
    kept_out: list[RejectedRow] = []
    try:
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
    except DataError as error:
        place = error.where.replace(str(path), name) if error.where else name
        _report(contents, "error", "unreadable", error.found, place, error.remedy, error.expected)
        return iter(())
    contents.rejected += rejected + kept_out
    for reason, count in sorted(Counter(row.reason for row in kept_out).items()):
        _report(contents, "note", "not-for-tests", f"{count} rows are left out: {reason}", name)
    for reason, count in sorted(Counter(row.reason for row in rejected).items()):
        first = next(row.row for row in rejected if row.reason == reason)
        everywhere = "every row is" if not candidates and count == len(rejected) else f"{count} rows are"
        _report(
            contents, "error", "rejected-rows", f"{everywhere} unusable: {reason}", f"{name}:{first}",
            "mend or replace the file; --no-strict goes on without these rows", f"rows of {benchmark.name}",
        )  # fmt: skip
    return iter(candidates)


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
        own = re.escape(benchmark.name.lower()).replace(r"\-", "-?")
        if re.search(rf"(?:^|-){own}\d*(?:-|$)", words):
            return benchmark
    return None


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
