"""A file's rows as examples, checked: one layout a file, no row that nothing can be learnt from.

`iterate_rows` streams; `read_rows` holds them all, with what a person should know of how they were read;
`read_examples` is for callers who need the rows alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorasmith.data.files import KINDS, Advance, raw_rows
from lorasmith.data.layouts import (
    LAYOUTS,
    MESSAGE_FIELDS,
    MOST_TURNS,
    QUESTIONS,
    Conversation,
    Layout,
    LayoutError,
    known_layouts,
    layout_of,
    read_question,
    require_text_only,
)
from lorasmith.errors import DataError
from lorasmith.files.digests import cache_folder
from lorasmith.parsing import parse_json
from lorasmith.records.base import Finding
from lorasmith.records.dataset import Example, Turn

MOST_CHARACTERS = 1 << 30
"""Of rows that are held together: more is no test set, and would not fit into memory for long."""
_MOST_NAMES = 50
COLUMNS = ("prompt", "response", "messages", "system", "tools", "text", "id")
"""What `--columns` may name a field for."""


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    number: int
    """Its line, or its place in a file without lines, from 1."""
    value: Mapping[str, Any]
    """As it stands in the file."""
    layout: str
    example: Example | None
    """None for a row that cannot be used."""
    fault: str = ""
    """Why it cannot be used."""


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """What of `COLUMNS` → the field that holds it; for layouts that are not known."""
    answered: bool = True
    """Whether a row needs an answer. Without one, what follows the last message that waits for an answer is
    left out."""


@dataclass
class Tally:
    """What rows were used and set aside, and how they were read."""

    layout: str = ""
    """That of the first row."""
    layouts: Counter[str] = field(default_factory=Counter)
    """How many rows there are of each layout."""
    unused: tuple[str, ...] = ()
    """Fields that hold something in a row and are not read by its layout."""
    used: int = 0
    """How many rows can be used."""
    faults: list[tuple[int, str]] = field(default_factory=list)
    """Row and reason of those that were set aside."""
    ids: dict[str, int] = field(default_factory=dict)
    """Id → the number of the row that has it; of an id that was made here -1 less the used rows before it."""
    renamed: dict[int, str] = field(default_factory=dict)
    """Used rows whose made id another row turned out to have → the id in its place."""

    def admit(
        self, row: Row, path: Path, how: Reading, *, skip: bool, made: str | None = None
    ) -> Example | None:
        """The example of a row, counted; None for one that is set aside.

        A row without an id gets the number of its row, or `made`; where an id is taken, a made one gives way.
        Raises `DataError` for a row that cannot be used, unless such rows are set aside.
        """
        example = row.example
        if example is None:
            self._set_aside(row, row.fault, path, skip=skip)
            return None
        name, number = example.id, row.number
        if row.value.get("id") is None:
            name, number = self._free(made or name), -1 - self.used
        elif self.ids.get(name, 0) < 0:
            # A row before this one was given the id that this one has.
            given = self.ids[name]
            other = self._free(name)
            self.ids[other], self.renamed[-1 - given] = given, other
        elif name in self.ids:
            self._set_aside(row, f"the id {name!r} stands in row {self.ids[name]} as well", path, skip=skip)
            return None
        self.ids[name] = number
        self.layout = self.layout or row.layout
        if len(self.unused) < _MOST_NAMES:
            self.unused = tuple(dict.fromkeys((*self.unused, *unused_fields(row, how))))
        self.layouts[row.layout] += 1
        self.used += 1
        return example if name == example.id else example.model_copy(update={"id": name})

    def _set_aside(self, row: Row, fault: str, path: Path, *, skip: bool) -> None:
        if not skip:
            raise fault_error(replace(row, fault=fault), path)
        self.faults.append((row.number, fault))

    def _free(self, wanted: str) -> str:
        """An id that no row has yet."""
        names = chain((wanted, f"row {wanted}"), (f"{wanted} ({number})" for number in count(2)))
        return next(name for name in names if name not in self.ids)


@dataclass
class Rows(Tally):
    """All rows of a file that can be used."""

    examples: list[Example] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    held: int = 0
    """Characters of the rows that are kept."""

    def keep(self, example: Example, path: Path) -> None:
        """Hold a row; `DataError` where all of them are more than a test set."""
        self.held += len(example.prompt) + len(example.response)
        self.held += len(json.dumps([example.tools, example.metadata.extra()], default=str))
        if self.held > MOST_CHARACTERS:
            raise DataError(
                f"the first {len(self.examples):,} rows hold more than {MOST_CHARACTERS >> 30} GiB of text",
                where=path,
                expected="as many rows as fit into memory",
                remedy="take a part of them into a file of its own",
            )
        self.examples.append(example)


def iterate_rows(path: Path, reading: Reading | None = None, advance: Advance | None = None) -> Iterator[Row]:
    """Each row of a file, in bounded memory; those that cannot be used with the reason.

    Raises `DataError` for what makes the whole file unreadable: a damaged file, an unknown layout in the
    first row, a column that the first row does not have.
    """
    how = reading or Reading()
    first: Layout | None = None
    begun = False
    for number, value in raw_rows(path, advance):
        named = _by_columns(value, how.columns, path, number, begun=begun)
        begun = True
        layout = layout_of(named)
        if first is None:
            if layout is None and (how.answered or not any(name in named for name in QUESTIONS)):
                raise unknown_layout(value, path, number)
            first = layout
        try:
            said = _read(named, layout, how, first)
            if layout is not None and first is not None and layout.family != first.family:
                raise LayoutError(
                    f"this row is of the layout {layout.name!r}, the first one of {first.name!r}"
                )
            yield Row(
                number, value, layout.name if layout else "question", _example(named, said, path, number)
            )
        except LayoutError as error:
            yield Row(number, value, layout.name if layout else "", None, str(error))


def read_rows(path: Path, reading: Reading | None = None, *, skip: bool = False) -> Rows:
    """All rows of a file. With `skip`, rows that cannot be used are set aside, counted and named.

    Raises `DataError` for the first row that cannot be used, for two rows with one id, and for a file without
    usable rows.
    """
    how = reading or Reading()
    rows = Rows()
    for row in iterate_rows(path, how):
        example = rows.admit(row, path, how, skip=skip)
        if example is not None:
            rows.keep(example, path)
    for place, name in rows.renamed.items():
        rows.examples[place] = rows.examples[place].model_copy(update={"id": name})
    if not rows.examples:
        found = "no row of the file can be used" if rows.faults else "the file has no rows"
        raise DataError(found, where=path, expected=f"rows as {KINDS}, of a layout with {known_layouts()}")
    rows.findings = findings_of(rows, path)
    return rows


def read_examples(path: Path) -> list[Example]:
    """The rows of a file, each with an answer; raises `DataError` as `read_rows` does."""
    return read_rows(path).examples


def findings_of(rows: Tally, path: Path) -> list[Finding]:
    """What a person should know of how the rows were read."""
    copied = told_of_copy(path)
    if copied:
        return copied
    note = next((layout.note for layout in LAYOUTS if layout.name == rows.layout), "")
    findings = []
    if note:
        findings.append(
            Finding(severity="note", code="layout", message=f"layout {rows.layout}: {note}", where=path.name)
        )
    if len(rows.layouts) > 1:
        told = ", ".join(f"{count} of {name}" for name, count in rows.layouts.most_common())
        findings.append(
            Finding(
                severity="note",
                code="layouts",
                message=f"the rows are of several layouts: {told}",
                where=path.name,
            )
        )
    if rows.unused:
        told = ", ".join(rows.unused[:12]) + (" …" if len(rows.unused) > 12 else "")
        message = f"layout {rows.layout}: the fields {told} are not read"
        findings.append(Finding(severity="note", code="fields-not-read", message=message, where=path.name))
    if rows.faults:
        number, reason = rows.faults[0]
        total = len(rows.faults) + rows.used
        findings.append(
            Finding(
                severity="warning",
                code="rows-set-aside",
                message=f"{len(rows.faults)} rows of {total} cannot be used and were set aside; "
                f"the first is row {number}: {reason}",
                where=path.name,
                remedy="mend them, or leave --skip-bad-rows out to stop at the first",
            )
        )
    return findings


def told_beside(copy: Path) -> Path:
    """Where the findings about a canonical copy in the cache lie."""
    return copy.with_suffix(".findings.json")


def told_of_copy(path: Path) -> list[Finding]:
    """What was found when the rows were copied into the cache; nothing for a file of a person's own."""
    told = told_beside(path)
    if not path.is_relative_to(cache_folder() / "rows") or not told.is_file():
        return []
    return [Finding.model_validate(one) for one in parse_json(told.read_bytes())]


def fault_error(row: Row, path: Path) -> DataError:
    """The message about a row that cannot be used."""
    return DataError(
        row.fault,
        where=f"{path}:{row.number}",
        expected="rows of one layout, each with an answer",
        remedy="mend or remove the row, or give --skip-bad-rows to set such rows aside and count them",
    )


def unknown_layout(row: Mapping[str, Any], path: Path, number: int) -> DataError:
    """The one message for a layout that is not known."""
    names = sorted(str(name) for name in row)
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return DataError(
        f"the row has no prompt and response of a layout that is known: its fields are {shown or 'none'}",
        where=f"{path}:{number}",
        expected=f"rows with {known_layouts()}",
        remedy="name the fields with --columns, such as --columns prompt=FIELD,response=FIELD",
    )


def _by_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], path: Path, number: int, *, begun: bool
) -> dict[str, Any]:
    if not columns:
        return dict(row)
    for name in columns.values():
        if name not in row and not begun:
            raise DataError(
                f"there is no column {name!r}",
                where=f"{path}:{number}",
                expected=f"one of {', '.join(sorted(map(str, row))[:20])}",
                remedy="correct --columns",
            )
    named = {key: row[name] for key, name in columns.items() if name in row}
    kept = ("id", "metadata", "source", "domain", "difficulty")
    return {**{name: row[name] for name in kept if name in row}, **named}


def _read(row: Mapping[str, Any], layout: Layout | None, how: Reading, first: Layout | None) -> Conversation:
    require_text_only(row, "the row")
    if layout is None:
        said = None if how.answered else read_question(row)
        lacking = [name for name in first.needs if row.get(name) is None] if first is not None else []
        if said is None and first is not None and len(lacking) < len(first.needs):
            raise LayoutError(f"the field {lacking[0]!r} is empty")
        if said is None:
            raise LayoutError(
                f"the row has no prompt and response: its fields are {', '.join(sorted(map(str, row))[:20])}"
            )
    else:
        said = layout.read(row)
    if not how.answered:
        return _waiting(said)
    _check_turns(said)
    return said


def _waiting(said: Conversation) -> Conversation:
    """The conversation up to the last message that waits for an answer."""
    if said.text:
        raise LayoutError("raw text asks nothing that could be answered")
    turns = list(said.turns)
    while turns and turns[-1].role == "assistant":
        turns.pop()  # the answer that the row was made for
    if not turns or turns[-1].role not in ("user", "tool", "ipython"):
        raise LayoutError("the last message before the answer is not from the user")
    _check_order(turns)
    return Conversation(tuple(turns), said.tools)


def _check_turns(said: Conversation) -> None:
    if said.text:
        return
    _check_order(said.turns)
    if not any(turn.role == "assistant" for turn in said.turns):
        raise LayoutError("no message is from the assistant: there is nothing to score")
    if said.turns[-1].role != "assistant":
        raise LayoutError(f"the last message is from the {said.turns[-1].role}: its answer is missing")


def _check_order(turns: Sequence[Turn]) -> None:
    if not turns:
        raise LayoutError("the conversation has no messages")
    if len(turns) > MOST_TURNS:
        raise LayoutError(f"the conversation has {len(turns):,} messages (at most {MOST_TURNS:,} are read)")
    for place, turn in enumerate(turns, 1):
        if not turn.content.strip() and not turn.tool_calls and turn.role != "tool":
            raise LayoutError(f"message {place} ({turn.role}) is empty")
        if turn.role in ("system", "developer") and place > 1:
            raise LayoutError(f"message {place} is a system prompt, which may only stand first")
        before = turns[place - 2].role if place > 1 else ""
        if turn.role == before and turn.role in ("assistant", "user"):
            raise LayoutError(f"messages {place - 1} and {place} are both from the {turn.role}")


def _example(row: Mapping[str, Any], said: Conversation, path: Path, number: int) -> Example:
    metadata = row.get("metadata")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise LayoutError("metadata is not an object")
    about = {name: value for name, value in (metadata or {}).items() if value is not None}
    for key in ("source", "domain", "difficulty"):
        value = row.get(key)
        if about.get(key) in (None, "") and isinstance(value, str) and value:
            about[key] = value
    about.setdefault("source", path.name.split(".")[0])
    name: Any = row.get("id")
    if name is None:
        name = about.get("record_id") or number
    body: dict[str, Any] = {"id": str(name), "metadata": about}
    try:
        return Example.model_validate({**body, **_texts(said)})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LayoutError(f"field {place!r}: {first['msg']}") from error


def _texts(said: Conversation) -> dict[str, Any]:
    """A question and its answer as such; all else as a conversation, or as raw text."""
    if said.text:
        return {"prompt": "", "response": said.text}
    plain = (
        [turn.role for turn in said.turns] == ["user", "assistant"]
        and not said.tools
        and all(turn == Turn(role=turn.role, content=turn.content) for turn in said.turns)
    )
    if plain:
        return {"prompt": said.turns[0].content, "response": said.turns[1].content}
    return {
        "prompt": "",
        "response": "",
        "messages": said.turns,
        "tools": said.tools,
    }


_ABOUT = frozenset(("id", "metadata", "source", "domain", "difficulty", "redacted"))
_BESIDE = frozenset(("system", "system_prompt", "history", "tools"))
"""What every layout of turns reads."""
_OF_QUESTIONS = frozenset((*QUESTIONS, "input", "context"))


def unused_fields(row: Row, how: Reading) -> tuple[str, ...]:
    """Fields of a row, and of the messages in it, that hold something and are not read."""
    layout = next((one for one in LAYOUTS if one.name == row.layout), None)
    read = {*how.columns.values(), *_ABOUT}
    if not how.columns:
        read |= {*layout.needs, *layout.also} if layout is not None else _OF_QUESTIONS
        read |= frozenset() if row.layout == "text" else _BESIDE
    names = [str(name) for name, value in row.value.items() if name not in read and _holds(value)]
    for name, value in row.value.items():
        if name in read and isinstance(value, list):
            messages = [one for one in value if isinstance(one, Mapping)]
            known = MESSAGE_FIELDS if name != "tools" else None
            if known is not None and any("role" in one or "from" in one for one in messages):
                names += [
                    f"{name}[].{key}"
                    for one in messages
                    for key, held in one.items()
                    if key not in known and _holds(held)
                ]
    return tuple(dict.fromkeys(names))


def _holds(value: Any) -> bool:
    return value not in (None, "", [], {})
