"""All interfaces of a benchmark on one screen: what comes in, what comes out, what a benchmark must say."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from lorasmith.records.dataset import Example

Scores = dict[str, float]
"""Metric → value in 0..1, such as `{"exact_match": 1.0, "f1": 1.0}`."""


def canonical(value: Any) -> bytes:
    """JSON bytes that are equal exactly when the values are: sorted keys, ASCII, no spaces."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str).encode()


class RowError(Exception):
    """A row that cannot be used; the message says why and never quotes the row (some texts are secret)."""


class NotForTests(RowError):
    """A sound row that its authors keep out of tests, such as one to learn from; counted in a note."""


class Unscored(Exception):
    """An answer that could not be scored, with the reason; it counts as unscored, never as 0."""


@dataclass(frozen=True)
class SourceRow:
    """One row as it stands in a file; without a header its keys are the column numbers "0", "1", …"""

    file: str
    number: int
    value: Mapping[str, Any]
    problem: str = ""
    """Why the row is damaged, such as a wrong number of columns; empty for a whole row."""

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(canonical(dict(self.value))).hexdigest()


@dataclass(frozen=True)
class Item:
    """What a benchmark makes of a row: the text of an example, and all that grouping and scoring need."""

    record_id: str
    prompt: str
    response: str
    question: str
    """What makes the row itself: two items with the same question (in the same scope) are duplicates."""
    scope: str = ""
    """Only items of one scope are compared for near duplicates, such as questions about one passage."""
    subdomain: str = "unknown"
    native: str = ""
    """The benchmark's own difficulty, empty where it has none."""
    native_field: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where a benchmark lies on the Hugging Face hub."""

    repository: str
    revision: str
    files: tuple[str, ...]
    note: str = ""
    """What a person should know about this copy."""
    known: dict[str, str] = field(default_factory=dict)
    """File → SHA-256, where it is known from elsewhere."""


class Judge(ABC):
    """How rows are put to a model, and how its answers are scored."""

    name: str

    answered_by: ClassVar[Literal["text", "letter", "ending"]] = "text"
    """A model writes a text; or of the letters of the row's choices the likeliest counts; or of the choices
    themselves, each as the end of the prompt, by the log-probability of all its tokens."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Names of the scores that a written answer gets."""
    max_new_tokens: int = 512
    """Longest answer, where a text is written."""
    stop_texts: tuple[str, ...] = ()
    """What ends a text where no chat template does."""

    needs: ClassVar[Mapping[str, Any]] = {}
    """What a verdict reads of a row's metadata: field → its type, as pydantic takes it."""
    may_lack: ClassVar[str] = ""
    """The field of these that a public layout lacks; `judge` says then why there is no verdict."""
    runs_code: ClassVar[bool] = False
    """True where a verdict comes from running what a model wrote, in the sandbox."""

    instruction: ClassVar[str] = ""
    """What the prompt says beside the row's own text."""

    def question_in(self, prompt: str) -> tuple[str, str]:
        """What of a prompt stands before the question, and the question, both without what we have added."""
        return "", prompt.replace(self.instruction, "").strip()

    @abstractmethod
    def judge(self, example: Example, answer: str) -> Scores:
        """Score an answer that is not blank. Raises `Unscored` where no verdict is possible."""

    def judge_likelihoods(self, example: Example, likelihoods: Sequence[float]) -> Scores:
        """Score the log-probabilities (nats) of the row's choices, where it is not a text that is written."""
        raise NotImplementedError(f"{self.name} is answered by a {self.answered_by}")

    def weight(self, example: Example, metric: str) -> float:
        """How much a row counts in the mean of a metric: 1, but for a metric over parts of rows."""
        return 1.0

    def answerable(self, example: Example) -> bool:
        """Whether the row can be put to a model as this benchmark is: some layouts lack the choices."""
        return self.answered_by == "text" or "choices" in example.metadata.extra()

    def fault(self, example: Example) -> str:
        """What is wrong with the metadata that a verdict needs, such as in a row made by hand; else empty."""
        extra = example.metadata.extra()
        for name, kind in self.needs.items():
            if name not in extra:
                return "" if name == self.may_lack else f"metadata.{name} is missing"
            try:
                TypeAdapter(kind).validate_python(extra[name], strict=True)
            except ValidationError as error:
                return f"metadata.{name}: {error.errors()[0]['msg']}"
        return ""

    def score(self, example: Example, answer: str) -> Scores:
        """Score what a model wrote, nothing as wrong; raises `Unscored` where no verdict is possible."""
        if fault := self.fault(example):
            raise Unscored(f"the row cannot be judged: {fault}")
        if not answer.strip():
            return dict.fromkeys(self.metrics, 0.0)
        return self.judge(example, answer)


class Benchmark(Judge):
    """One benchmark. A subclass is final, keeps no state, and stands in `registry.BENCHMARKS`."""

    domain: ClassVar[str]
    source: ClassVar[str]
    licence: ClassVar[str]
    columns: ClassVar[str]
    """The fields that a row has in each public layout, for whoever brings another file."""
    private: ClassVar[bool] = False
    """True where the authors ask that no example appears in plain text."""
    graded: ClassVar[bool] = False
    """True where every published row has a difficulty: a file without any is damaged."""

    references: ClassVar[bool] = True
    """False where no answer is published: the response of its rows says so, and no loss is computed of it."""

    hub: ClassVar[Source | None] = None
    """Where it is fetched from; None where everybody has to bring a copy."""
    splits: ClassVar[tuple[str, ...]] = ("test", "validation", "unnamed", "train")
    """Which split is taken, the first that is there; `unnamed` are files that name none."""

    @abstractmethod
    def recognises(self, row: SourceRow) -> bool:
        """Whether the fields of the row are those of one of this benchmark's public layouts."""

    @abstractmethod
    def read(self, row: SourceRow, *, seed: int) -> Item:
        """Make an item; `seed` fixes the order of choices. Raises `RowError` for an unusable row."""

    @abstractmethod
    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        """`easy`, `medium` or `hard` by the procedure's fixed rule, and the field that decided it."""

    def unpack(self, document: Any) -> Iterable[dict[str, Any]] | None:
        """The rows of a JSON document in a nested layout of this benchmark, or None if it is not one."""
        return None


def text(row: SourceRow, *names: str) -> str:
    """The first of the fields that is there, as text that is not blank, else `RowError`."""
    for name in names:
        if name in row.value:
            value = row.value[name]
            if not isinstance(value, str):
                raise RowError(f"the field {name!r} is not text")
            if not value.strip():
                raise RowError(f"the field {name!r} is empty")
            return value
    raise RowError(f"the field {names[0]!r} is missing")
