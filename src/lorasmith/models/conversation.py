"""A conversation as one text, and where in it the assistant's answers stand.

The template writes the whole conversation once. Where its answers are is found in the first of three ways
that works, and each is held against that text, so that no token is scored which is not in it:

1. *marks*: the template says it itself, by `{% generation %}`. The last answer alone is looked for by
   prefixes first: where it begins is where the model is really asked.
2. *prefixes*: the text up to an answer is the template's own for the messages before it, with the start of an
   answer; the end is that of the messages up to it. Both must be how the whole text begins.
3. *contents*: where the template writes earlier turns otherwise once others follow (Qwen3 leaves earlier
   reasoning out), an answer is found by its content: rendered with a mark on both sides of each answer, and
   without the marks again the same text. Long conversations are searched this way first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lorasmith.errors import DataError, UsageError
from lorasmith.models import chat_template
from lorasmith.options import TemplateOptions
from lorasmith.records.dataset import Example, Turn

_OPEN, _CLOSE = "lorasmithopens", "lorasmithcloses"
"""Marks of plain letters: no template trims or escapes them."""


@dataclass(frozen=True)
class Wording:
    """What a row is put into words with, beside the template itself."""

    system: str | None = None
    """System prompt of rows that have none."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Names that the template may ask for, such as `enable_thinking`."""

    @classmethod
    def of(cls, options: TemplateOptions) -> Wording:
        """As the options say; raises `UsageError` for names that a template gets anyway."""
        taken = sorted(set(options.template_args) & set(chat_template.RESERVED))
        if taken:
            raise UsageError(
                f"--template-args names {taken[0]!r}, which every template is given anyway",
                expected="names of the template's own, such as enable_thinking",
            )
        return cls(options.system, options.template_args)


@dataclass(frozen=True)
class Answer:
    """One turn of the assistant in the text."""

    turn: int
    """Index of its message."""
    number: int
    """Which of the assistant's turns it is, from 1."""
    start: int
    """Index of its first character."""
    stop: int
    """Index behind its last character: what ends the turn is in it, a line break after that is not."""


@dataclass(frozen=True)
class Script:
    """A conversation as the model sees it."""

    text: str
    answers: tuple[Answer, ...]
    found_by: str
    """`marks`, `prefixes` or `contents`."""
    asked: str
    """What the model is given before the last answer; mostly the beginning of the text."""
    marked: tuple[tuple[int, int], ...] = ()
    """What the template marks, answer by answer, white space at its end included; empty for other ways."""


def turns_of(example: Example, wording: Wording) -> tuple[Turn, ...]:
    """The turns of a row, with the system prompt where the row has none of its own."""
    turns = example.turns
    if wording.system is None or (turns and turns[0].role in ("system", "developer")):
        return turns
    return (Turn(role="system", content=wording.system), *turns)


def write_script(tokenizer: Any, example: Example, wording: Wording, *, last_only: bool) -> Script:
    """The whole conversation of a row, and its answers; with `last_only` the last one alone is looked for.

    Raises `DataError` naming the row where the template refuses it, leaves its tool calls out, or writes
    answers so that they cannot be found.
    """
    turns = turns_of(example, wording)
    messages = [turn.message() for turn in turns]
    try:
        whole = chat_template.render_marked(
            tokenizer, messages, tools=example.tools, arguments=wording.arguments
        )
        _require_tools(example, turns, whole.text)
        places = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
        numbers = dict(zip(places, range(1, len(places) + 1), strict=True))
        if last_only:
            whole = replace(whole, answers=whole.answers[-1:] if len(whole.answers) == len(places) else [])
            places = places[-1:]
        written = _Written(tokenizer, example, wording, messages, whole)
        spans, found_by = written.spans(places, last_only=last_only)
        asked = written.before(places[-1])
    except chat_template.TemplateRefusal as error:
        raise refused(example, error) from error
    answers = tuple(Answer(place, numbers[place], *span) for place, span in zip(places, spans, strict=True))
    marked = tuple(whole.answers) if found_by == "marks" else ()
    return Script(whole.text, answers, found_by, asked, marked)


def refused(example: Example, error: Exception) -> DataError:
    """The message for a row that the template does not lay out."""
    return DataError(
        f"the chat template refuses this row: {str(error).strip() or type(error).__name__}",
        where=f"example {example.id!r}",
        expected="messages in the roles and the order that the template knows",
        remedy="mend or remove the row, or give --template plain for rows of one prompt and one response",
    )


MANY_ANSWERS = 64
"""From so many answers on they are found by their contents first: prefixes take a rendering for each, whose
length grows with the conversation."""


@dataclass(frozen=True)
class _Written:
    """A conversation and the text that the template makes of it."""

    tokenizer: Any
    example: Example
    wording: Wording
    messages: Sequence[chat_template.Message]
    whole: chat_template.Rendered

    def render(self, messages: Sequence[chat_template.Message], *, start_answer: bool) -> str:
        """The text of other messages, with the same tools and names."""
        return chat_template.render(
            self.tokenizer,
            messages,
            start_answer=start_answer,
            tools=self.example.tools,
            arguments=self.wording.arguments,
        )

    @cached_property
    def _before(self) -> dict[int, str]:
        return {}

    def before(self, place: int) -> str:
        """What the model is given before the answer at a place among the messages."""
        if place not in self._before:
            self._before[place] = self.render(self.messages[:place], start_answer=True)
        return self._before[place]

    def spans(self, places: Sequence[int], *, last_only: bool) -> tuple[list[tuple[int, int]], str]:
        """Where the answers at these places among the messages stand, and how they were found."""
        marks, prefixes = ("marks", self.by_marks), ("prefixes", self.by_prefixes)
        ways = [prefixes, marks] if last_only else [marks, prefixes]
        contents = ("contents", self.by_contents)
        ways.insert(1 if len(places) >= MANY_ANSWERS else 2, contents)
        for name, find in ways:
            found = find(places)
            if found is not None:
                return found, name
        raise DataError(
            "the answers cannot be found in the text that the chat template makes of this row",
            where=f"example {self.example.id!r}",
            expected="a template that writes each answer as it stands, or marks it by {% generation %}",
            remedy="give a template with these marks by --chat-template FILE, or remove the row",
        )

    def by_marks(self, places: Sequence[int]) -> list[tuple[int, int]] | None:
        """What the template marks; None where it does not mark as many answers as there are."""
        if len(self.whole.answers) != len(places):
            return None
        return [_trimmed(self.whole.text, start, stop) for start, stop in self.whole.answers]

    def by_prefixes(self, places: Sequence[int]) -> list[tuple[int, int]] | None:
        """From the text before each answer to the text behind it; None where one of them is no beginning."""
        text, spans = self.whole.text, []
        for place in places:
            before = self.before(place)
            last = place + 1 == len(self.messages)
            after = text if last else self.render(self.messages[: place + 1], start_answer=False)
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                return None
            spans.append(_trimmed(text, len(before), len(after)))
        return spans

    def by_contents(self, places: Sequence[int]) -> list[tuple[int, int]] | None:
        """Each content with what ends its turn; None where the marks change the text around them."""
        marked = list(self.messages)
        for number, place in enumerate(places):
            content = self.messages[place]["content"]
            if not content.strip():
                return None  # a turn of tool calls alone has no content to be found by
            marked[place] = {
                **self.messages[place],
                "content": f"{_OPEN}{number}x{content.strip()}{_CLOSE}{number}x",
            }
        end = self._end_of_turn(marked[: places[-1] + 1], f"{_CLOSE}{len(places) - 1}x")
        found = self.render(marked, start_answer=False)
        spans: list[tuple[int, int]] = []
        at, plain = 0, ""
        for number in range(len(places)):
            opened, closed = f"{_OPEN}{number}x", f"{_CLOSE}{number}x"
            start, stop = found.find(opened, at), found.find(closed, at)
            if not at <= start < stop:
                return None
            plain += found[at:start]
            begin = len(plain)
            plain += found[start + len(opened) : stop]
            spans.append((begin, len(plain)))
            at = stop + len(closed)
        text = self.whole.text
        if plain + found[at:] != text:
            return None
        # What the last answer thought stands before its content, and is its own.
        before = self.before(places[-1])
        if text.startswith(before) and len(before) < spans[-1][0]:
            spans[-1] = (len(before), spans[-1][1])
        limits = [*(start for start, _ in spans[1:]), len(text)]
        return [
            (start, _behind_end(text, stop, limit, end, calls=bool(self.messages[place].get("tool_calls"))))
            for (start, stop), limit, place in zip(spans, limits, places, strict=True)
        ]

    def _end_of_turn(self, marked: Sequence[chat_template.Message], closed: str) -> str:
        """What the template writes behind the content of an answer that is the last message."""
        return self.render(marked, start_answer=False).rpartition(closed)[2].strip()


def _behind_end(text: str, stop: int, limit: int, end: str, *, calls: bool) -> int:
    """Where a turn ends whose content ends at `stop`: behind `end`, if that follows before `limit`.

    Between a content and the end of its turn only its tool calls may stand.
    """
    place = text.find(end, stop, limit) if end else -1
    if place < 0 or (not calls and text[stop:place].strip()):
        return stop
    return place + len(end)


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    """Without the white space that stands behind the end of a turn."""
    return start, start + len(text[start:stop].rstrip())


def _require_tools(example: Example, turns: Sequence[Turn], text: str) -> None:
    names = [call["function"]["name"] for turn in turns for call in turn.tool_calls]
    missing = next((name for name in names if name not in text), None)
    if missing is not None:
        raise DataError(
            f"the chat template leaves the call of the tool {missing!r} out",
            where=f"example {example.id!r}",
            expected="a template that knows tool calls",
            remedy="give one by --chat-template FILE, or remove rows with tool calls",
        )
