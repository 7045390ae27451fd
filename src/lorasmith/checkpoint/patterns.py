"""rank_pattern and alpha_pattern: regular expressions out of an adapter, matched within bounded time."""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from lorasmith.errors import AdapterError

T = TypeVar("T")

SECONDS = 5.0
"""The time that matching all modules of an adapter may take; honest patterns need milliseconds."""
_LONGEST = 2000
_MOST = 50_000
"""An entry for each module of the largest mixture-of-experts models."""
_PLAIN = re.compile(r"[\w.]*")

_ANSWER = """
import json, re, sys
known = [re.compile(text) for text in json.loads(sys.stdin.readline())]
print(len(known), flush=True)
for line in sys.stdin:
    name = json.loads(line)
    print(next((place for place, one in enumerate(known) if one.match(name)), -1), flush=True)
"""


class Patterns(Mapping[str, T], Generic[T]):
    """Pattern → value, in the order of the config, and the value of a module.

    A module has the value of the first pattern that matches its whole path or the end of it behind a dot, as
    PEFT looks it up: `re.match(r"(.*\\.)?(PATTERN)$", path)`. For some expressions that takes exponential
    time, and nothing can stop it within a process (the `regex` package's own limit was overrun by a minute).
    So expressions are matched in another process, which is ended after `SECONDS`. Plain names need none.
    """

    def __init__(self, values: Mapping[str, T], field: str, where: Path) -> None:
        self._values = dict(values)
        self._texts = list(self._values)
        self._field = field
        self._where = where
        self._found: dict[str, int] = {}
        self._other: _OtherProcess | None = None
        if len(self._texts) > _MOST:
            raise AdapterError(
                f"the adapter's {field} has {len(self._texts):,} patterns",
                where=where,
                expected=f"at most {_MOST:,}",
            )
        checked = [self._check(text) for text in self._texts]
        self._plain = all(checked)

    def __getitem__(self, pattern: str) -> T:
        return self._values[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def of(self, module: str, otherwise: T) -> T:
        """The value of a module; raises `AdapterError` where matching takes longer than it may."""
        if module not in self._found:
            self._found[module] = self._first_plain(module) if self._plain else self._ask(module)
        place = self._found[module]
        return otherwise if place < 0 else self._values[self._texts[place]]

    def _check(self, text: str) -> bool:
        """Whether it is a plain name, in which a dot still stands for any character."""
        if _PLAIN.fullmatch(text):
            return True
        try:
            re.compile(text)
            re.compile(_whole(text))
            if len(text) > _LONGEST:
                raise ValueError(f"{len(text)} characters are too many")
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise AdapterError(
                f"the adapter's {self._field} is {text[:80]!r}",
                where=self._where,
                expected=f"{self._field}: regular expressions ({error})",
            ) from error
        return False

    def _first_plain(self, module: str) -> int:
        for place, text in enumerate(self._texts):
            start = len(module) - len(text)
            behind_a_dot = start == 0 or (start > 0 and module[start - 1] == ".")
            if behind_a_dot and all(map(_same, text, module[start:])):
                return place
        return -1

    def _ask(self, module: str) -> int:
        if self._other is None:
            self._other = _OtherProcess([_whole(text) for text in self._texts])
        place = self._other.ask(module)
        if place is None:
            raise _too_long(self._field, self._texts, self._where)
        return place


def require_quick(raw: Mapping[str, object], names: Sequence[str], where: Path) -> None:
    """Raise `AdapterError` unless PEFT can match a config's expressions to these module paths in time.

    For whoever lets PEFT load an adapter: it matches in its own process and has no limit.
    """
    for field, (for_text, for_items) in _IN_PEFT.items():
        value = raw.get(field)
        if isinstance(value, str):
            texts, form = [value], for_text
        else:
            items = value if isinstance(value, dict | list) and for_items is not None else []
            texts, form = [text for text in items if isinstance(text, str)], for_items
        if form is None or all(_PLAIN.fullmatch(text) for text in texts):
            continue
        # What does not compile, PEFT refuses; but it may meet the others first.
        other = _OtherProcess([whole for text in texts if _compiles(whole := form.format(text))])
        if any(other.ask(name) is None for name in names):
            raise _too_long(field, texts, where)


_IN_PEFT: dict[str, tuple[str | None, str | None]] = {
    "rank_pattern": (None, r"(.*\.)?({})$"),
    "alpha_pattern": (None, r"(.*\.)?({})$"),
    "target_modules": (r"(?:{})\Z", r"(^|.*\.){}($|\..*)"),
    "exclude_modules": (r"(?:{})\Z", None),
    "modules_to_save": (None, r"(^|.*\.){}($|\..*)"),
    "layers_pattern": (r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
}
"""Field → what PEFT 0.21 matches module paths against, from a text in it, and from each of its items."""


def _compiles(whole: str) -> bool:
    try:
        re.compile(whole)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _too_long(field: str, texts: Sequence[str], where: Path) -> AdapterError:
    return AdapterError(
        f"matching the adapter's {field} takes too long: '{', '.join(texts)[:80]}'",
        where=where,
        expected=f"patterns that are matched within {SECONDS:.0f} s",
        remedy="write them as the names of the modules that they mean",
    )


def _whole(text: str) -> str:
    return rf"(.*\.)?({text})$"


def _same(meant: str, given: str) -> bool:
    return meant == given or (meant == "." and given != "\n")


class _OtherProcess:
    """Matches one name after the other; it ends with its input, hence with this process or this object."""

    def __init__(self, expressions: Sequence[str]) -> None:
        self._left = SECONDS
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _ANSWER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        weakref.finalize(self, _end, self._process)
        self._send(list(expressions))
        self._receive(starting=True)

    def ask(self, name: str) -> int | None:
        """The place of the first pattern that fits, -1 for none; None when the time is used up."""
        if self._left <= 0:
            return None
        self._send(name)
        return self._receive()

    def _send(self, body: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(body) + "\n")
        self._process.stdin.flush()

    def _receive(self, *, starting: bool = False) -> int | None:
        assert self._process.stdout is not None
        began = time.monotonic()
        # A busy machine may need long to start an interpreter, which is not the patterns' fault.
        patience = 60.0 if starting else self._left
        if not select.select([self._process.stdout], [], [], patience)[0]:
            self._left = 0
            self._process.kill()
            return None
        if not starting:
            self._left -= time.monotonic() - began
        return int(self._process.stdout.readline())


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
