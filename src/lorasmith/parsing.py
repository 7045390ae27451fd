"""JSON and TOML that somebody else wrote: one reader, and one kind of error whatever is wrong with them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any, NoReturn

MAX_DEPTH = 100
"""Lists and objects within each other; configs of models need some ten.

Python's own bound is that of the call stack, which whatever walks the value later would meet in its turn.
"""
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"

PairsHook = Callable[[list[tuple[str, Any]]], Any]


def parse_json(text: bytes | str, *, finite: bool = False, pairs_hook: PairsHook | None = None) -> Any:
    """The value of a JSON document; bytes are UTF-8, and a byte order mark may lead them.

    With `finite` no NaN and no infinity is taken; `pairs_hook` makes each object from its pairs. Raises
    `UnicodeDecodeError` for what is no UTF-8, and `ValueError` for what is no JSON, nests too deeply or holds
    a number of thousands of digits.
    """
    decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
    decoder = _FINITE if finite else _ANY
    if pairs_hook is not None:
        constant = _refuse_constant if finite else None
        decoder = json.JSONDecoder(object_pairs_hook=pairs_hook, parse_constant=constant)
    try:
        value = decoder.decode(decoded)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Counting costs next to nothing and settles nearly every document. Brackets within strings count as well,
    # so that a large count proves nothing yet.
    if decoded.count("[") + decoded.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def parse_toml(text: bytes) -> dict[str, Any]:
    """The table of a TOML document; raises `UnicodeDecodeError` and `ValueError` as `parse_json` does."""
    try:
        value = tomllib.loads(text.decode())
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    """Go down level by level, without recursion, which a deep value would break."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


# Made once: making a decoder takes longer than reading a short row.
_ANY = json.JSONDecoder()
_FINITE = json.JSONDecoder(parse_constant=_refuse_constant)
