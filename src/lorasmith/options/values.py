"""Kinds of values that several options have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lorasmith.options.base import Flag
from lorasmith.parsing import parse_json

_SHORT_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _long_type(value: Any) -> Any:
    return _SHORT_TYPES.get(value, value) if isinstance(value, str) else value


def _or_auto(value: Any) -> Any:
    return None if value == "auto" else value


def _several(value: Any) -> Any:
    """One value stands for a list of one."""
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


def _names(value: Any) -> Any:
    """Names with commas, or one by one."""
    texts = [value] if isinstance(value, str) else value or ()
    return [name.strip() for text in texts for name in str(text).split(",") if name.strip()]


def _split(value: Any) -> Any:
    """`2,4,6` is a list of three."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _object(value: Any) -> Any:
    """JSON text of an object, or the object."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, finite=True)
    except ValueError as error:
        raise ValueError(f"this is not JSON ({error}): {value[:80]!r}") from error


LongType = BeforeValidator(_long_type)
"""Takes bf16, fp16 and fp32 for bfloat16, float16 and float32."""
OrAuto = BeforeValidator(_or_auto)
"""Takes `auto` for no number."""
OneOrSeveral = BeforeValidator(_several)
WithCommas = BeforeValidator(_split)
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]

NamedValues = Annotated[dict[str, Any], BeforeValidator(_object)]
"""An object of JSON, on the command line as text."""

Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], LongType]
Template = Literal["auto", "chat", "plain"]
Model = Annotated[Path, Flag(metavar="MODEL", hub=True)]
"""A folder, or the name of a model on the hub."""
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Dollars = Annotated[float, Field(ge=0)]
