"""What all records share: frozen, closed, finite numbers only, one canonical JSON form."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from lorasmith.errors import InputError, Where
from lorasmith.parsing import parse_json


class Part(BaseModel):
    """A piece of a record: frozen, no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Record(Part):
    """A document with a format name and version, readable by programs for years."""

    FORMAT: ClassVar[str] = ""
    """`lorasmith/<name>/<version>`; a new version whenever a field changes its meaning."""

    def to_json(self) -> bytes:
        """Canonical bytes: `format` first, then the fields in order of definition, two-space indent."""
        body: dict[str, Any] = {"format": self.FORMAT, **self.model_dump(mode="json")}
        return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes | str, where: Where) -> Self:
        """Parse and check; raises `InputError` naming `where` and the first wrong field."""
        try:
            body = parse_json(text)
        except ValueError as error:
            raise InputError(f"not JSON: {error}", where=where, expected=f"a {cls.FORMAT} record") from error
        format_name = body.pop("format", None) if isinstance(body, dict) else None
        if format_name != cls.FORMAT:
            raise InputError(
                f"this is not a {cls.FORMAT} record: its format is {format_name!r}",
                where=where,
                expected=f'"format": "{cls.FORMAT}"',
                remedy="give a file written by this version of lorasmith, or run the stage again",
            )
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InputError(
                f"field {field!r} is wrong: {first['msg']}", where=where, expected=f"a {cls.FORMAT} record"
            ) from error


class FileDigest(Part):
    """One file as it was when it was read or written."""

    path: str
    """Relative to the folder that the record describes, with forward slashes."""
    bytes: int
    sha256: str


class Interval(Part):
    """A confidence interval."""

    low: float
    high: float
    level: float = 0.95


class Finding(Part):
    """Something a person should know about an input or a result."""

    severity: str
    """`error`, `warning` or `note`."""
    code: str
    """Short and stable, for programs: `lfs-pointer`, `empty-response`, …"""
    message: str
    where: str | None = None
    """File, with `:row` where one row is meant, or the name of a tensor."""
    expected: str | None = None
    remedy: str | None = None
