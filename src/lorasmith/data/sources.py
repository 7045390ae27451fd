"""Where rows come from: a file, a folder of files, or a data set of the Hugging Face hub.

All commands work on one file, whose bytes a record can name. What is not one file, and what can only be read
with a person's help (`--columns`, `--skip-bad-rows`), is written out once as canonical JSONL, into the cache,
under a name that its contents and the way of reading decide.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import fspath
from pathlib import Path
from typing import Any, TypeVar

from lorasmith.data.rows import COLUMNS, Reading, Rows, fault_error, findings_of, iterate_rows
from lorasmith.errors import DataError, UsageError, os_errors
from lorasmith.files.atomic import StrPath, atomic_file
from lorasmith.files.digests import cache_folder, sha256_file
from lorasmith.files.inputs import require_own_links
from lorasmith.files.jsonl import dump_row
from lorasmith.options import ReadingOptions
from lorasmith.parsing import parse_json
from lorasmith.records.base import Finding

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_PACKED = (".gz", ".zst")
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.\[\]%:-]+))?")
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
_REVISION = 1
"""Raised when the same files would be written out otherwise."""


@dataclass(frozen=True)
class Prepared:
    """A file that every command can read."""

    path: Path
    findings: list[Finding] = field(default_factory=list)


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """`prompt=question,response=best_answer` as a mapping; raises `UsageError` for anything else."""
    columns: dict[str, str] = {}
    for pair in (pair.strip() for text in given for pair in text.split(",")):
        key, sign, name = pair.partition("=")
        if not sign or key not in COLUMNS or not name or key in columns:
            raise UsageError(
                f"--columns holds {pair!r}",
                expected=f"KEY=FIELD, each key once, of {', '.join(COLUMNS)}",
                remedy="give it as --columns prompt=FIELD,response=FIELD",
            )
        columns[key] = name
    if columns and not ("messages" in columns or "text" in columns or {"prompt", "response"} <= set(columns)):
        raise UsageError(
            "--columns names no field to learn from",
            expected="prompt and response, or messages, or text",
        )
    return columns


def prepare(
    given: StrPath, *, columns: Mapping[str, str] | None = None, skip: bool = False, answered: bool = True
) -> Prepared:
    """The file itself where it can be read as it is, else a canonical copy of its rows in the cache.

    Raises `DataError` for what cannot be read, `UsageError` where a hub's data set needs a split.
    """
    path = Path(given)
    reading = Reading(columns or {}, answered)
    if path.is_file() and not reading.columns and not skip:
        return Prepared(path)
    if path.is_dir():
        require_own_links(path)
        files = folder_files(path)
        return _written(files, path.name, reading, skip)
    if path.exists():
        return _written([path], path.name.split(".")[0], reading, skip)
    named = _HUB.fullmatch(fspath(given))
    if named is None or not names_hub(path):
        raise DataError(
            "the file does not exist",
            where=path,
            expected="a file, a folder of files, or org/name[:split] of the Hugging Face hub",
        )
    from lorasmith.data.hub import export

    name = named[1].replace("/", "--") + (f"--{named[2]}" if named[2] else "")
    return _written([export(named[1], named[2])], re.sub(r"[^\w.-]", "_", name), reading, skip)


def local_rows(given: StrPath, options: ReadingOptions, *, answered: bool = True) -> Path:
    """One file of rows, whatever was given, read as the options say: see `prepare`.

    What is to be known of the reading stands beside a copy, where `read_rows` finds it.
    """
    columns = parse_columns(options.columns)
    return prepare(given, columns=columns, skip=options.skip_bad_rows, answered=answered).path


Given = TypeVar("Given", bound=ReadingOptions)


def with_local_rows(options: Given) -> Given:
    """Options whose fields for rows name local files that can be read without further help."""
    changed: dict[str, Any] = {"columns": (), "skip_bad_rows": False}
    for name in _ROWS & type(options).model_fields.keys():
        value = getattr(options, name)
        if isinstance(value, tuple):
            changed[name] = tuple(local_rows(one, options) for one in value)
        elif value is not None:
            changed[name] = local_rows(value, options)
    return options.model_copy(update=changed)


_ROWS = {"test_set", "train", "calibration"}
"""Options that name rows."""


def names_hub(path: Path) -> bool:
    """Whether a path that leads to nothing may be the name of a data set."""
    named = _HUB.fullmatch(fspath(path)) is not None
    return named and not path.exists() and path.suffix not in (*SUFFIXES, *_PACKED)


def folder_files(folder: Path) -> list[Path]:
    """The files of rows in a folder, by name; raises `DataError` for none, or for several splits."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and _suffix(path) in SUFFIXES
        and path.name not in ("dataset_info.json", "state.json", "dataset_dict.json")
    )
    if not files:
        raise DataError(
            "the folder holds no files of rows",
            where=folder,
            expected=f"files that end in {', '.join(SUFFIXES)}",
        )
    splits = sorted({split for path in files for split in _SPLITS if _is_of(path.relative_to(folder), split)})
    if len(splits) > 1:
        raise DataError(
            f"the folder holds several splits: {', '.join(splits)}",
            where=folder,
            expected="files of one split",
            remedy="give one of its files, or a folder with one of the splits",
        )
    return files


def _suffix(path: Path) -> str:
    bare = path.with_suffix("") if path.suffix in _PACKED else path
    return bare.suffix.lower()


def _is_of(path: Path, split: str) -> bool:
    return any(re.split(r"[-_.]", part.lower())[0] == split for part in path.parts)


def _written(files: Sequence[Path], name: str, reading: Reading, skip: bool) -> Prepared:
    """The rows of some files as one canonical file, unless the cache has it."""
    key = {
        "revision": _REVISION,
        "files": [[path.name, sha256_file(path)] for path in files],
        "columns": dict(reading.columns),
        "answered": reading.answered,
        "skip": skip,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    place = cache_folder() / "rows" / digest[:32] / f"{name}.jsonl"
    told = told_beside(place)
    if not (place.is_file() and told.is_file()):
        rows = Rows()
        with os_errors(place, "write"):
            place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place) as handle:
            for row in _canonical(files, reading, skip, rows):
                handle.write(dump_row(row))
        findings = findings_of(rows, files[0])
        with atomic_file(told) as handle:
            handle.write(json.dumps([one.model_dump(mode="json") for one in findings]).encode())
    return Prepared(place, [Finding.model_validate(one) for one in parse_json(told.read_bytes())])


def told_beside(copy: Path) -> Path:
    """Where the findings about a canonical copy lie."""
    return copy.with_suffix(".findings.json")


def _canonical(files: Sequence[Path], reading: Reading, skip: bool, rows: Rows) -> Iterator[dict[str, Any]]:
    root = Path(os.path.commonpath([path.absolute().parent for path in files]))
    seen: set[str] = set()
    for path in files:
        for row in iterate_rows(path, reading):
            if row.example is None:
                if not skip:
                    raise fault_error(row, path)
                rows.faults.append((row.number, row.fault))
                continue
            rows.note(row, reading)
            rows.layouts[row.layout] += 1
            body = row.example.model_dump(mode="json")
            if row.value.get("id") is None and (len(files) > 1 or body["id"] in seen):
                body["id"] = f"{path.absolute().relative_to(root).as_posix()}:{row.number}"
            if body["id"] in seen:
                if not skip:
                    raise DataError(
                        f"the id {body['id']!r} stands in an earlier row as well",
                        where=f"{path}:{row.number}",
                    )
                rows.faults.append((row.number, f"the id {body['id']!r} stands in an earlier row as well"))
                continue
            seen.add(body["id"])
            rows.used += 1
            yield body
    if not rows.used:
        raise DataError("no row can be used", where=files[0], expected="at least one row that can be scored")
