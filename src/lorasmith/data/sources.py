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
from os import fspath
from pathlib import Path
from typing import Any, TypeVar

from lorasmith.data.rows import COLUMNS, Reading, Tally, findings_of, iterate_rows, told_beside
from lorasmith.errors import DataError, UsageError, os_errors
from lorasmith.files.atomic import StrPath, atomic_file
from lorasmith.files.digests import cache_folder, sha256_file
from lorasmith.files.inputs import require_own_links
from lorasmith.files.jsonl import dump_row
from lorasmith.options import ReadingOptions
from lorasmith.parsing import parse_json
from lorasmith.records.dataset import Example

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_PACKED = (".gz", ".zst")
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.\[\]%:-]+))?")
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
_REVISION = 2
"""Raised when the same files would be written out otherwise."""


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
) -> Path:
    """The file itself where it can be read as it is, else a canonical copy of its rows in the cache.

    What is to be known of the reading stands beside a copy (`rows.told_of_copy`). Raises as `source_files`
    does, and for rows that cannot be read.
    """
    path = Path(given)
    reading = Reading(columns or {}, answered)
    if path.is_file() and not reading.columns and not skip:
        return path
    files = source_files(given)
    name = path.name.split(".")[0] if path.is_file() else path.name
    if not path.exists():
        name = re.sub(r"[^\w.-]", "_", fspath(given).replace("/", "--").replace(":", "--"))
    return _written(files, name, reading, skip)


def source_files(given: StrPath) -> list[Path]:
    """The files that hold the rows: one, those of a folder, or that of a data set of the hub.

    Raises `DataError` for what does not exist, `UsageError` where a hub's data set needs a split.
    """
    path = Path(given)
    if path.is_dir():
        require_own_links(path)
        return folder_files(path)
    if path.exists():
        return [path]
    named = _HUB.fullmatch(fspath(given))
    if named is None or path.suffix in (*SUFFIXES, *_PACKED):
        raise DataError(
            "the file does not exist",
            where=path,
            expected="a file, a folder of files, or org/name[:split] of the Hugging Face hub",
        )
    from lorasmith.data.hub import export

    return [export(named[1], named[2])]


def local_rows(given: StrPath, options: ReadingOptions, *, answered: bool = True) -> Path:
    """One file of rows, whatever was given, read as the options say: see `prepare`.

    What is to be known of the reading stands beside a copy, where `read_rows` finds it.
    """
    columns = parse_columns(options.columns)
    return prepare(given, columns=columns, skip=options.skip_bad_rows, answered=answered)


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


def _written(files: Sequence[Path], name: str, reading: Reading, skip: bool) -> Path:
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
        tally = Tally()
        with os_errors(place, "write"):
            place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place) as handle:
            for example in _examples(files, reading, skip, tally):
                handle.write(dump_row(example.model_dump(mode="json")))
        if tally.renamed:
            _rename(place, tally.renamed)
        findings = findings_of(tally, files[0])
        with atomic_file(told) as handle:
            handle.write(json.dumps([one.model_dump(mode="json") for one in findings]).encode())
    return place


def _examples(files: Sequence[Path], reading: Reading, skip: bool, tally: Tally) -> Iterator[Example]:
    root = Path(os.path.commonpath([path.absolute().parent for path in files]))
    for path in files:
        relative = path.absolute().relative_to(root).as_posix()
        for row in iterate_rows(path, reading):
            made = f"{relative}:{row.number}" if len(files) > 1 else None
            example = tally.admit(row, path, reading, skip=skip, made=made)
            if example is not None:
                yield example
    if not tally.used:
        raise DataError("no row can be used", where=files[0], expected="at least one row that can be scored")


def _rename(place: Path, renamed: Mapping[int, str]) -> None:
    """Give rows of a canonical file, counted from 0, another id."""
    with place.open("rb") as lines, atomic_file(place) as handle:
        for number, line in enumerate(lines):
            row = parse_json(line)
            handle.write(dump_row({**row, "id": renamed[number]}) if number in renamed else line)
