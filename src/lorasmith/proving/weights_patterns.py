"""Which pattern of a config a module fits: asked of Python's own `re`, in a process that can be ended.

Its matcher tries exponentially many ways for some expressions, and nothing can stop it from within. Patterns
that cannot do so, because nothing in them is optional, repeated or a choice, are matched here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from lorasmith.errors import MachineError

SECONDS = 10.0
"""For all modules of an adapter together; honest patterns take milliseconds."""
_NAMES_AT_ONCE = 20_000
_FEW = 1_000_000
"""Matches of plain patterns that take some seconds at most."""
_PLAIN = re.compile(r"[A-Za-z0-9_.\\-]*")
"""Characters, dots and escapes: each stands for exactly one character."""

_ASK = """
import json, re, sys
patterns, names = json.load(sys.stdin)
whole = [re.compile(r"(.*\\.)?(" + pattern + ")$") for pattern in patterns]
json.dump([next((i for i, one in enumerate(whole) if one.match(name)), None) for name in names], sys.stdout)
"""


class PatternError(Exception):
    """A pattern that is no expression, or that takes too long; says which and why."""


def check(pattern: str) -> None:
    """Raise `PatternError` for what Python cannot read as an expression, alone or where PEFT puts it."""
    try:
        re.compile(pattern)
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"the pattern {pattern[:80]!r}: {error}") from error


def first_fitting(patterns: Sequence[str], names: Iterable[str]) -> dict[str, str | None]:
    """Name → the first pattern that fits it, or None; raises `PatternError` where that takes too long."""
    wanted = list(dict.fromkeys(names))
    few = len(patterns) * len(wanted) <= _FEW
    if few and all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        whole = [(pattern, re.compile(rf"(.*\.)?({pattern})$")) for pattern in patterns]
        return {name: next((text for text, one in whole if one.match(name)), None) for name in wanted}
    found: dict[str, str | None] = {}
    for start in range(0, len(wanted), _NAMES_AT_ONCE):
        part = wanted[start : start + _NAMES_AT_ONCE]
        places = _ask(patterns, part)
        for name, place in zip(part, places, strict=True):
            found[name] = None if place is None else patterns[place]
    return found


def _ask(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _ASK],
            input=json.dumps([list(patterns), list(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PatternError(
            f"its patterns take longer than {SECONDS:.0f} s to match: '{', '.join(patterns)[:80]}'"
        ) from error
    if done.returncode != 0:
        raise MachineError(
            f"the process that matches patterns ended with {done.returncode}",
            where=sys.executable,
            expected=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else None,
        )
    places: list[int | None] = json.loads(done.stdout)
    return places
