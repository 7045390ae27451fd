"""Records of test sets: the example, its metadata, the counts."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import (
    ConfigDict,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from lorasmith.records.base import FileDigest, Finding, Part, Record


class Metadata(Part):
    """Where an example comes from and how it is grouped; a benchmark adds what its scorer needs."""

    model_config = ConfigDict(extra="allow")

    source: str
    """The benchmark's or the file's name."""
    domain: str = "unknown"
    difficulty: str = "unknown"
    difficulty_from: str = "none"
    """Policy and field that gave the difficulty, such as `guide:level`."""
    record_id: str = ""
    """The row's own id in its source."""
    file: str = ""
    sha256: str = ""
    """SHA-256 of the source row's canonical JSON."""

    def extra(self) -> dict[str, Any]:
        """What the benchmark added (choices, golds, tests, …)."""
        return dict(self.model_extra or {})


class Turn(Part):
    """One message of a conversation, in the field names of chat templates."""

    role: str
    """`system`, `user`, `assistant`, `tool`, or another name that the model's template knows."""
    content: str = ""
    reasoning_content: str | None = None
    """What the assistant thought before it answered, where the row keeps it apart."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    """Name of the speaker or of the tool."""
    tool_call_id: str | None = None
    train: bool | None = None
    """Whether the row's own flag says that this turn is learnt; None where it has no flag."""

    def message(self) -> dict[str, Any]:
        """What a chat template is given: the fields that are set, without the flag."""
        return {
            "role": self.role,
            "content": self.content,
            **self.model_dump(
                mode="json", exclude={"role", "content", "train"}, exclude_defaults=True, exclude_none=True
            ),
        }


_TURNS = TypeAdapter(tuple[Turn, ...])


class Example(Part):
    """One row of a test set or training file.

    Three kinds: a prompt and its response; a conversation, whose `prompt` and `response` are derived from its
    messages; and raw text, which has a response and no prompt. Written as JSON, a conversation has
    `messages` (and `tools`) in place of `prompt` and `response`, raw text has `text`; reading these forms
    gives the same example.
    """

    id: str
    prompt: str
    """What stands before the last answer. Of a conversation: its turns as `role: text`, to be read by people
    and compared, never to be shown to a model."""
    response: str
    """The last answer."""
    metadata: Metadata
    messages: tuple[Turn, ...] = ()
    """All turns of a conversation, answers included; empty for the other kinds."""
    tools: tuple[dict[str, Any], ...] = ()
    """Definitions of the tools that a conversation may call."""

    @model_validator(mode="before")
    @classmethod
    def _derives_texts(cls, row: Any) -> Any:
        if isinstance(row, dict) and "text" in row:
            return {"prompt": "", "response": row["text"], **{k: v for k, v in row.items() if k != "text"}}
        if not isinstance(row, dict) or not row.get("messages"):
            return row
        turns = _TURNS.validate_python(row["messages"])
        last = max(
            (place for place, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns)
        )
        answer = turns[last].content if last < len(turns) else ""
        asked = "\n\n".join(_readable(turn) for turn in turns[:last])
        return {**row, "messages": turns, "prompt": asked, "response": answer}

    @model_serializer(mode="wrap")
    def _one_form_of_each_kind(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        row = dump(self)
        if self.is_text:
            return {"id": row["id"], "text": row["response"], "metadata": row["metadata"]}
        if not self.messages:
            return {name: row[name] for name in ("id", "prompt", "response", "metadata")}
        row["messages"] = [
            {name: value for name, value in turn.items() if value not in (None, [], ())}
            for turn in row["messages"]
        ]
        names = ("id", "messages", "tools", "metadata") if self.tools else ("id", "messages", "metadata")
        return {name: row[name] for name in names}

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The example as a conversation: of a prompt and its response two turns, of raw text none."""
        if self.messages or not self.prompt:
            return self.messages
        return Turn(role="user", content=self.prompt), Turn(role="assistant", content=self.response)

    @property
    def has_reference(self) -> bool:
        """Whether the response is an answer; a benchmark without published ones says `reference: false`."""
        return self.metadata.extra().get("reference") is not False

    @property
    def is_text(self) -> bool:
        """Whether it is raw text, all of which is scored."""
        return not self.prompt and not self.messages

    @property
    def content(self) -> tuple[str, str]:
        """Prompt and response without regard to case and white space: equal for copies of a row."""
        return " ".join(self.prompt.casefold().split()), " ".join(self.response.casefold().split())


def _readable(turn: Turn) -> str:
    parts = [turn.reasoning_content or "", turn.content]
    parts += [json.dumps(call, sort_keys=True, ensure_ascii=False) for call in turn.tool_calls]
    return f"{turn.role}: " + "\n".join(part for part in parts if part)


class DatasetStatistics(Record):
    """`statistics.json`: how many examples, by group and by crossing of groups."""

    FORMAT: ClassVar[str] = "lorasmith/dataset-statistics/1"

    examples: int
    file: FileDigest
    seed: int | None = None
    by_source: dict[str, int]
    by_domain: dict[str, int]
    by_difficulty: dict[str, int]
    crossings: dict[str, dict[str, int]]
    """`source × difficulty` and so on, each `a / b` → count."""
    asked: dict[str, int] = {}
    """Per source, how many were asked for (fewer are present only where the file has fewer)."""
    findings: list[Finding] = []


class TokenCounts(Part):
    """Lengths of rows in tokens, as a model sees them."""

    tokenizer: str
    """Name of the folder that it is from."""
    template: str
    """`chat` or `plain`."""
    boundary: str
    loss_on: str
    total: int
    scored: int
    shortest: int
    median: int
    most_are_below: int
    """The 95 % quantile."""
    longest: int
    straddling: int
    """Rows in which prompt and answer share a token."""
    too_long: int | None = None
    """Rows of more than `max_length` tokens; None where no length was asked for."""


class ShownRow(Part):
    """One row as it was read and, where there is a tokenizer, as a model sees it."""

    id: str
    place: str
    """File and row."""
    layout: str
    turns: list[str]
    """Roles, in their order; `text` alone for raw text."""
    pieces: list[tuple[str, bool]]
    """Text after text, and whether its tokens are scored."""
    tokens: int | None = None
    scored: int | None = None


class DataRecord(Record):
    """What `lorasmith data show` says of rows."""

    FORMAT: ClassVar[str] = "lorasmith/data/1"

    files: list[str]
    rows: int
    """How many can be used."""
    layouts: dict[str, int]
    """Layout → rows."""
    answers: dict[str, int]
    """Number of the assistant's turns → rows; 0 for raw text."""
    system_prompts: int
    """Rows that have one."""
    tools: int
    """Rows that have tools."""
    characters: int
    tokens: TokenCounts | None = None
    """None without a tokenizer."""
    faults: list[tuple[str, str]] = []
    """The first rows that cannot be used, and why."""
    unusable: int = 0
    shown: list[ShownRow] = []
    findings: list[Finding] = []


class RejectedRow(Part):
    """A row that was not used. Its text is never repeated here: some benchmarks may not appear in plain."""

    benchmark: str
    file: str
    row: int
    reason: str
    sha256: str = ""
    """SHA-256 of the row's canonical JSON, to find it again in one's own copy."""


class DatasetFindings(Record):
    """`findings.json`: what was wrong with the files, and every row that was left out."""

    FORMAT: ClassVar[str] = "lorasmith/dataset-findings/1"

    findings: list[Finding] = []
    rejected: list[RejectedRow] = []


class FetchedFile(Part):
    """A benchmark file from the hub."""

    benchmark: str
    repository: str
    revision: str
    path: str
    """Relative to the folder of the record."""
    bytes: int
    sha256: str
    checked_against: str


class FetchRecord(Record):
    """`fetched.json`: what was downloaded, and what could not be."""

    FORMAT: ClassVar[str] = "lorasmith/benchmarks-fetched/1"

    files: list[FetchedFile] = []
    findings: list[Finding] = []


class SplitRecord(Record):
    """`split.json`: a seeded hold-out from a training file."""

    FORMAT: ClassVar[str] = "lorasmith/split/1"

    train: FileDigest
    test: FileDigest
    size: int
    seed: int
    stratify_by: list[str]
    strata: dict[str, dict[str, int]]
    """Stratum → `{rows, held_out}`."""
    removed_from_train: bool
    train_after: FileDigest | None = None
    """The training file without the rows held out; None when it was left as it was."""
    backup: str | None = None
    """Name of the copy of the training file as it was before."""
    rows_removed: int = 0
    """At least `size`: further training rows with a prompt that was held out go as well."""
    findings: list[Finding] = []


class ContaminationRecord(Record):
    """`contamination.json`: is the test set independent of the training data?"""

    FORMAT: ClassVar[str] = "lorasmith/contamination/1"

    verdict: str
    """`independent`, `contaminated` or `not checked`."""
    reason: str = ""
    test: FileDigest | None = None
    train: list[FileDigest] = []
    rows_test: int = 0
    rows_train: int = 0
    parameters: dict[str, Any] = {}
    counts: dict[str, int] = {}
    """Hits by kind: `exact`, `question`, `ngram`, `near`; `test_rows` affected; `dropped` from the set."""
    hits: list[ContaminationHit] = []
    """The strongest of each test row and kind; `counts` counts all."""

    def is_verdict(self, hit: ContaminationHit) -> bool:
        """Whether a hit makes its test row contaminated: shared runs do from the share that was asked for."""
        return hit.kind != "ngram" or hit.score >= float(self.parameters.get("share", 0))


class ContaminationHit(Part):
    """One test row that the training data holds too."""

    kind: str
    """`exact`: the row, or its prompt, is a training row. `question`: its question stands in the training
    data word by word. `ngram`: it shares runs of words. `near`: its prompt is much like one there."""
    test_id: str
    train_id: str
    train_file: str
    score: float
    """1.0 for exact and question, else the share of the row's own runs, or the Jaccard similarity."""


ContaminationRecord.model_rebuild()
