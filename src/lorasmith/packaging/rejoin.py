"""Rows that left as ids and hashes, joined again with the text from one's own copy of their source."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorasmith.errors import DamageError, DataError
from lorasmith.files.jsonl import read_rows
from lorasmith.packaging.contents import RESULTS
from lorasmith.records.dataset import Example
from lorasmith.records.redaction import Redacted, salted_sha256


def rejoin(folder: Path, own: Iterable[Example]) -> list[Example]:
    """The whole test set of an unpacked package, each hidden row shown to be the one of `own` with its id.

    `own` may hold further rows. Raises `DataError` for a hidden row that `own` lacks, `DamageError` for one
    whose text is not what was used.
    """
    path = _test_set(folder)
    known = {example.id: example for example in own}
    return [_whole(row, known, f"{path}:{number}") for number, row in read_rows(path)]


def _test_set(folder: Path) -> Path:
    for place in (folder / RESULTS, folder):
        path = place / "testset" / "test_set.jsonl"
        if path.is_file():
            return path
    raise DataError(
        "there is no test set here",
        where=folder,
        expected=f"{RESULTS}/testset/test_set.jsonl",
        remedy="unpack validation_results first",
    )


def _whole(row: dict[str, Any], known: dict[str, Example], where: str) -> Example:
    if "redacted" not in row:
        return Example.model_validate(row)
    try:
        redacted = Redacted.model_validate(row["redacted"])
    except ValidationError as error:
        raise DataError("this row's hash is not complete", where=where, expected="salt and sha256") from error
    own = known.get(str(row.get("id")))
    if own is None:
        raise DataError(
            f"your copy has no row {row.get('id')!r}",
            where=where,
            expected="a test set built from the same source with the same seed",
        )
    if salted_sha256(redacted.salt, own.prompt, own.response) != redacted.sha256:
        raise DamageError(
            f"your row {own.id!r} is not the one that was used",
            where=where,
            expected=f"salted SHA-256 {redacted.sha256}",
        )
    return own
