"""A person's own metric: a Python file with `score(example, answer)`, loaded where `--task-module` names it.

    NAME = "titles"                  # what records, report and gates call it; by default the file's name
    SOURCES = ("my_titles",)         # rows by metadata.source; by default those of no known benchmark
    MAX_NEW_TOKENS = 40              # by default 512
    STOP_TEXTS = ("\\n",)             # what ends an answer where no chat template does

    def prompt(example): ...         # the text that is put to the model; by default the row's own prompt
    def score(example, answer): ...  # 0..1, or {metric: 0..1}; None where there is no verdict

It is the caller's own code: it runs in this process with all its rights; its SHA-256 stands in the record.
Whatever goes wrong in it is one message that names file and line, and answers already written are kept.
"""

from __future__ import annotations

import hashlib
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from lorasmith.benchmarks.base import Judge, Scores, Unscored
from lorasmith.benchmarks.registry import BY_NAME
from lorasmith.errors import LorasmithError, UsageError, os_errors
from lorasmith.files.inputs import read_input
from lorasmith.records.base import FileDigest
from lorasmith.records.dataset import Example

_MODULE = "lorasmith_task_module"
_RESULT = "a number in 0..1, a dict of them by metric, or None where there is no verdict"


class OwnMetric(Judge):
    """The judge that such a file makes; written answers only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with os_errors(path, "read the task module"):
            source = read_input(path)
        self.file = FileDigest(path=path.name, bytes=len(source), sha256=hashlib.sha256(source).hexdigest())
        self._metrics: tuple[str, ...] = ()
        # What was hashed is what runs: the file is read once. Dataclasses look their module up by its name.
        self.module = sys.modules[_MODULE] = ModuleType(_MODULE)
        self.module.__file__ = str(path)
        self._run(lambda: exec(compile(source, str(path), "exec"), vars(self.module)))
        if not callable(getattr(self.module, "score", None)):
            raise UsageError(
                "the file defines no function score", where=path, expected="def score(example, answer): …"
            )
        self.name = self._constant("NAME", str, path.stem)
        self.sources = tuple(self._constant("SOURCES", tuple | list, ()))
        self.max_new_tokens = self._constant("MAX_NEW_TOKENS", int, Judge.max_new_tokens)
        self.stop_texts = tuple(self._constant("STOP_TEXTS", tuple | list, ()))
        self._check_constants()

    def _constant(self, name: str, kind: Any, default: Any) -> Any:
        value = getattr(self.module, name, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = {str: "a text", int: "a whole number"}.get(kind, "a tuple of texts")
            raise UsageError(f"{name} is {value!r}", where=self.path, expected=wanted)
        return value

    def _check_constants(self) -> None:
        if not self.name.strip() or self.name in BY_NAME:
            raise UsageError(
                f"NAME is {self.name!r}", where=self.path, expected="a name of its own, not a benchmark's"
            )
        if self.max_new_tokens < 1:
            raise UsageError(
                f"MAX_NEW_TOKENS is {self.max_new_tokens}", where=self.path, expected="1 or more"
            )
        for name in ("SOURCES", "STOP_TEXTS"):
            if not all(isinstance(one, str) and one for one in getattr(self.module, name, ())):
                raise UsageError(f"{name} holds something else", where=self.path, expected="a tuple of texts")

    def takes(self, example: Example) -> bool:
        """Whether the row is one of those that it judges; raw text has nothing to ask."""
        if example.is_text and not hasattr(self.module, "prompt"):
            return False
        source = example.metadata.source
        return source in self.sources if self.sources else source not in BY_NAME

    def prompt(self, example: Example) -> str | None:
        """The text that is put to the model in place of the row's own prompt; None for the row's own."""
        make = getattr(self.module, "prompt", None)
        if make is None:
            return None
        text = self._run(lambda: make(example), example)
        if not isinstance(text, str) or not text.strip():
            raise self._wrong("prompt", f"prompt gave {_short(text)}", "a text that is not blank", example)
        return text

    def try_on(self, example: Example) -> None:
        """Score a row's own response: most mistakes show before hours of answers, not after them."""
        self.prompt(example)
        with suppress(Unscored):
            self.judge(example, example.response)
        self._metrics = ()

    def score(self, example: Example, answer: str) -> Scores:
        """What the file says of an answer, a blank one as well."""
        return self.judge(example, answer)

    def judge(self, example: Example, answer: str) -> Scores:
        """The scores of the file's own function; raises `Unscored` where it gives None."""
        given = self._run(lambda: self.module.score(example, answer), example)
        if given is None:
            raise Unscored("score gave None")
        scores = given if isinstance(given, Mapping) else {"score": given}
        if (
            not scores
            or not all(isinstance(name, str) and name for name in scores)
            or not all(_is_share(value) for value in scores.values())
        ):
            raise self._wrong("score", f"score gave {_short(given)}", _RESULT, example)
        self._metrics = self._metrics or tuple(scores)
        if set(scores) != set(self._metrics):
            # A metric is a mean over all rows, so that no row may leave it out.
            found = f"score gave the metrics {', '.join(scores)}"
            raise self._wrong(
                "score", found, f"those of the rows before: {', '.join(self._metrics)}", example
            )
        return {name: float(value) for name, value in scores.items()}

    def _run(self, work: Any, example: Example | None = None) -> Any:
        try:
            return work()
        except LorasmithError:
            raise
        except (Exception, SystemExit) as error:
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename == str(self.path)
            ]
            line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else (lines or [None])[-1]
            row = f", with the row {example.id!r}" if example else ""
            raise UsageError(
                f"the task module failed: {type(error).__name__}: {_short(error, str)}{row}",
                where=f"{self.path}:{line}" if line else self.path,
                remedy="mend it and give the same command again: answers that are written are kept",
            ) from error

    def _wrong(self, function: str, found: str, expected: str, example: Example) -> UsageError:
        code = getattr(getattr(self.module, function), "__code__", None)
        line = f":{code.co_firstlineno}" if code else ""
        return UsageError(
            f"{found} for the row {example.id!r}", where=f"{self.path}{line}", expected=expected
        )


_SHOWN_SIGNS = 300


def _short(value: object, as_text: Callable[[object], str] = repr) -> str:
    """What a message shows of something that the module made, however long, or whatever its `repr` does."""
    try:
        shown = as_text(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"
    return shown if len(shown) <= _SHOWN_SIGNS else f"{shown[:_SHOWN_SIGNS]}…"


def _is_share(value: object) -> bool:
    """A number (NumPy's count) in 0..1, or True and False."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str) and math.isfinite(number) and 0 <= number <= 1


def judge_of(example: Example, own: OwnMetric | None) -> Judge | None:
    """Who asks and judges a row: the own metric where it takes the row, else its benchmark, else nobody."""
    if own is not None and own.takes(example):
        return own
    benchmark = BY_NAME.get(example.metadata.source)
    return benchmark if benchmark is not None and benchmark.answerable(example) else None
