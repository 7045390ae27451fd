"""What a merge says of itself in its own record, held against what was read for the proof."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorasmith.errors import InputError
from lorasmith.files.atomic import read_record
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.merging import MergeRecord

RECORD = "lorasmith_merge.json"

CHECKABLE = ("nearest", "dithered", "calibrated")
"""Roundings whose result this proof can judge."""


@dataclass(frozen=True)
class Claims:
    """What a merge says of itself; nothing of it is believed unchecked."""

    record: MergeRecord | None = None
    problem: Finding | None = None

    @property
    def rounding(self) -> str:
        """Without a record, the rule that every tool means to follow."""
        return self.record.rounding if self.record else "nearest"

    def rounding_of(self, tensor: str) -> str:
        """The rule of one tensor with products; a calibrated merge says which it could only dither."""
        if self.record is None or self.record.rounding != "calibrated":
            return self.rounding
        return self._own.get(tensor, "nearest")

    @cached_property
    def _own(self) -> dict[str, str]:
        return {tensor.name: tensor.rounding for tensor in self.record.tensors} if self.record else {}


@dataclass(frozen=True)
class Identity:
    """What was read for this proof, by digest."""

    base: str
    adapters: list[str]
    merged: list[FileDigest]
    weights: list[float]


def read_claims(merged: Path) -> Claims:
    """Read the merge's own record, if it has one; raises `InputError` for a rounding unknown here."""
    path = merged / RECORD
    if not path.is_file():
        return Claims()
    try:
        record = read_record(path, MergeRecord)
    except InputError as error:
        return Claims(problem=_error("damaged-record", error.found, RECORD, error.expected))
    if record.rounding not in CHECKABLE:
        raise InputError(
            f"cannot check rounding {record.rounding!r}",
            where=path,
            expected=" or ".join(repr(name) for name in CHECKABLE),
            remedy="merge with one of these, or compare the behaviour of the models instead",
        )
    wrong = sorted({tensor.rounding for tensor in record.tensors} - set(CHECKABLE))
    if record.rounding != "nearest" and (record.seed is None or wrong):
        raise InputError(
            f"the record of a {record.rounding} merge has no seed"
            if record.seed is None
            else f"the record holds tensors of an unknown rounding {wrong[0]!r}",
            where=path,
            expected="a record as `lorasmith merge` writes it",
        )
    return Claims(record)


def check_claims(claims: Claims, identity: Identity, into: str) -> Iterator[Finding]:
    """All findings on the record; those of severity `error` make a merge `different`.

    `into` is what was found of the merge: a quantized base, in its own format or in 16 bits, or neither.
    """
    if claims.problem:
        yield claims.problem
    if claims.record:
        if claims.record.into != into:
            text = f"the record has {claims.record.into!r} for what a quantized base was merged into"
            yield _error("record-disagrees", text, RECORD, repr(into))
        yield from _check_record(claims.record, identity)


def _check_record(record: MergeRecord, identity: Identity) -> Iterator[Finding]:
    claimed = {file.path: file for file in record.files}
    actual = {file.path: file for file in identity.merged if file.path != RECORD}
    for path in sorted(claimed.keys() | actual.keys()):
        if path not in actual:
            yield _error("record-disagrees", f"the record lists {path!r}, which is missing", path)
        elif path not in claimed:
            yield _warning("unlisted-file", f"the merge's record does not list {path!r}", path)
        elif claimed[path] != actual[path]:
            yield _error(
                "record-disagrees", f"{path!r} is not the file the record lists", path, claimed[path].sha256
            )
    if record.base_sha256 != identity.base:
        yield _warning(
            "other-base-files",
            "the merge was made from a base folder with other files",
            RECORD,
            identity.base,
        )
    if record.adapter_sha256 != identity.adapters:
        yield _warning("other-adapter-files", "the merge had adapter folders with other files", RECORD)
    if record.adapter_weights != identity.weights:
        yield _error(
            "record-disagrees",
            f"the record has the adapter weights {record.adapter_weights}",
            RECORD,
            str(identity.weights),
        )


def _error(code: str, message: str, where: str, expected: str | None = None) -> Finding:
    return Finding(severity="error", code=code, message=message, where=where, expected=expected)


def _warning(code: str, message: str, where: str, expected: str | None = None) -> Finding:
    return Finding(severity="warning", code=code, message=message, where=where, expected=expected)
