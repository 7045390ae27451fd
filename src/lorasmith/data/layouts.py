"""The layouts of rows that people have, as a list to read: which fields each needs, and how it becomes turns.

A layout is told by its fields, never by a file's name. `LAYOUTS` is gone through from the top and the first
one whose fields a row has is the row's: so the more telling ones stand before those that share names with
many others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lorasmith.data.files import UNREADABLE
from lorasmith.parsing import parse_json
from lorasmith.records.dataset import Turn

Row = Mapping[str, Any]

MOST_TURNS = 1_000
"""A conversation of more is a wrong file: no model's context holds them."""
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
"""Names in use → those of chat templates; a `function_call` is the assistant's."""
_NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio")
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
_SYSTEMS = ("system", "system_prompt")
_REASONING = ("reasoning_content", "reasoning", "thinking")


_FLAGS = ("train", "training", "weight")
MESSAGE_FIELDS = frozenset(
    {"role", "from", "content", "value", "tool_calls", "function_call", "name", "tool_call_id"}
).union(_REASONING, _FLAGS)
"""Fields of a message that are read."""


class LayoutError(ValueError):
    """Why a row cannot be read; its text is a whole message without the place."""


@dataclass(frozen=True)
class Conversation:
    """What a row says."""

    turns: tuple[Turn, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""
    """Raw text; then there are no turns."""


@dataclass(frozen=True)
class Layout:
    """One way to write a row."""

    name: str
    needs: tuple[str, ...]
    """Fields that a row of this layout has."""
    read: Callable[[Row], Conversation]
    family: str
    """Layouts of one family may stand in one file, since they say the same with other names."""
    also: tuple[str, ...] = ()
    """Further fields that it reads, beside a system prompt, a history and tools."""
    note: str = ""
    """What a person has to know of how it is used; empty where nothing is left out or chosen."""

    def holds(self, row: Row) -> bool:
        """Whether a row is of this layout."""
        return all(row.get(name) is not None for name in self.needs)


def layout_of(row: Row) -> Layout | None:
    """The layout of a row; None where it is none of them."""
    return next((layout for layout in LAYOUTS if layout.holds(row)), None)


# From fields to turns.


def _messages(row: Row, field: str) -> Conversation:
    value = row[field]
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = _json(value, f"the field {field!r}")
    if not isinstance(value, list):
        raise LayoutError(f"the field {field!r} is not a list of messages")
    before = _before(row)
    turns = [_turn(message, f"message {place} of {field!r}") for place, message in enumerate(value, 1)]
    if _has_system(value):
        # The system prompt comes first, wherever a history stands.
        if before and before[0].role == "system":
            if turns[0].content != before[0].content:
                raise LayoutError(
                    f"the row has a system prompt of its own, and {field!r} begins with another"
                )
            before = before[1:]
        return Conversation((turns[0], *before, *turns[1:]), _tools(row))
    return Conversation((*before, *turns), _tools(row))


def _has_system(messages: Sequence[Any]) -> bool:
    first = messages[0] if messages else None
    return isinstance(first, dict) and first.get("role", first.get("from")) in ("system", "developer")


def _pair(row: Row, prompt: str, answer: str, *, more: str = "") -> Conversation:
    asked = row[prompt]
    if isinstance(asked, list) and not _is_parts(asked):
        turns = list(_messages(row, prompt).turns)
    else:
        question = _required(asked, prompt)
        added = _text(row[more], more) if row.get(more) is not None else ""
        if added.strip():
            question = f"{question}\n\n{added}"
        turns = [*_before(row), Turn(role="user", content=question)]
    return Conversation((*turns, *_answer(row[answer], answer)), _tools(row))


def _answer(value: Any, field: str) -> list[Turn]:
    if isinstance(value, list) and not _is_parts(value):
        return [_turn(message, f"message {place} of {field!r}") for place, message in enumerate(value, 1)]
    # Answers are numbers in tables; a question never is one.
    text = json.dumps(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    return [Turn(role="assistant", content=_required(text, field))]


def _is_parts(value: Sequence[Any]) -> bool:
    """Whether a list is one content of several parts, not messages."""
    first = value[0] if value else None
    return isinstance(first, str) or (isinstance(first, dict) and "type" in first and "role" not in first)


def _preference(row: Row) -> Conversation:
    chosen = row["chosen"]
    asked = next((name for name in _ASKED if row.get(name) is not None), None)
    if isinstance(chosen, list) and (asked is None or _starts_with_prompt(chosen)):
        return _messages(row, "chosen")
    if asked is not None:
        return _pair(row, asked, "chosen")
    turns = _spoken(chosen) if isinstance(chosen, str) else ()
    if turns:
        return Conversation((*_before(row), *turns), _tools(row))
    raise LayoutError("'chosen' is text without Human: and Assistant:, and the row has no 'prompt'")


_ASKED = ("prompt", "question", "instruction", "input")
_SPEAKERS = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def _spoken(text: str) -> tuple[Turn, ...]:
    """Turns that are written as `Human: …` and `Assistant: …`, as in Anthropic's pairs; else none."""
    parts = _SPEAKERS.split(text)
    if parts[0].strip() or len(parts) < 5:
        return ()
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return tuple(Turn(role=roles[name], content=said.strip()) for name, said in pairs)


def _starts_with_prompt(chosen: Sequence[Any]) -> bool:
    """Whether the chosen side repeats the prompt, as the layouts of two generations of TRL differ."""
    first = chosen[0] if chosen else None
    return (
        isinstance(first, dict) and len(chosen) > 1 and first.get("role") in ("user", "system", "developer")
    )


def _raw_text(row: Row) -> Conversation:
    return Conversation(text=_required(row["text"], "text"))


def _before(row: Row) -> list[Turn]:
    """A system prompt and earlier turns that stand in fields of their own."""
    turns = []
    systems = {
        text for name in _SYSTEMS if row.get(name) is not None and (text := _text(row[name], name)).strip()
    }
    if len(systems) > 1:
        raise LayoutError(f"the fields {' and '.join(map(repr, _SYSTEMS))} hold two system prompts")
    turns += [Turn(role="system", content=text) for text in systems]
    history = row.get("history")
    if history is None:
        return turns
    if not isinstance(history, list):
        raise LayoutError("the field 'history' is not a list of [question, answer]")
    for place, pair in enumerate(history, 1):
        if isinstance(pair, dict):
            turns.append(_turn(pair, f"message {place} of 'history'"))
        elif isinstance(pair, list | tuple) and len(pair) == 2:
            turns.append(Turn(role="user", content=_required(pair[0], f"history[{place}]")))
            turns.append(Turn(role="assistant", content=_required(pair[1], f"history[{place}]")))
        else:
            raise LayoutError(f"entry {place} of 'history' is not [question, answer]")
    return turns


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise LayoutError(f"{where} is not an object with role and content")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise LayoutError(f"{where} has no role")
    require_text_only(message, where)
    role = ROLES.get(role.lower(), role.lower())
    content = message.get("content", message.get("value"))
    text = "" if content is None else _text(content, where)
    if role == "function_call":
        return Turn(role="assistant", tool_calls=tuple(_calls(text, where)), train=_flag(message, where))
    if role not in KNOWN_ROLES:
        raise LayoutError(f"{where} has the unknown role {role!r} (known: {', '.join(KNOWN_ROLES)})")
    calls = message.get("tool_calls") or message.get("function_call")
    reasoning = next((message[name] for name in _REASONING if isinstance(message.get(name), str)), None)
    return Turn(
        role=role,
        content=text,
        reasoning_content=reasoning or None,
        tool_calls=tuple(_calls(calls, where)) if calls else (),
        name=message.get("name") if isinstance(message.get("name"), str) else None,
        tool_call_id=message.get("tool_call_id") if isinstance(message.get("tool_call_id"), str) else None,
        train=_flag(message, where),
    )


def require_text_only(held: Mapping[str, Any], where: str) -> None:
    for name in _NOT_TEXT:
        if held.get(name):
            raise LayoutError(f"{where} has {name!r}: images, sound and files are not read, only text is")


def _flag(message: Mapping[str, Any], where: str) -> bool | None:
    """OpenAI's `weight` (0 or 1), axolotl's `train` and `training`."""
    for name in _FLAGS:
        value = message.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise LayoutError(f"{where}: {name} is {value!r}, expected 0, 1, true or false")
        return bool(value)
    return None


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as templates want them: arguments as an object, where the row has them as JSON text."""
    if isinstance(calls, str):
        calls = _json(calls, f"the tool call of {where}")
    calls = calls if isinstance(calls, list) else [calls]
    result = []
    for call in calls:
        if not isinstance(call, dict):
            raise LayoutError(f"a tool call of {where} is not an object")
        holder = call.get("function", call)
        if not isinstance(holder, dict) or not isinstance(holder.get("name"), str):
            raise LayoutError(f"a tool call of {where} has no name")
        arguments = holder.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"the arguments of a tool call of {where}")
        function = {"name": holder["name"], "arguments": arguments}
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append({**identity, "type": "function", "function": function})
    return result


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools")
    if tools is None or tools == "":
        return ()
    if isinstance(tools, str):
        tools = _json(tools, "the field 'tools'")
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise LayoutError("the field 'tools' is not a list of tool definitions")
    return tuple(tools)


def _json(text: str, what: str) -> Any:
    try:
        return parse_json(text, finite=True)
    except ValueError as error:
        raise LayoutError(f"{what} is not JSON ({error})") from error


def _required(value: Any, field: str) -> str:
    text = _text(value, field)
    if not text.strip():
        raise LayoutError(f"the field {field!r} is empty")
    return text


def _text(value: Any, field: str) -> str:
    """Text as such, or as a list of text parts; anything else in such a list is no text to learn."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and UNREADABLE in value:
        raise LayoutError(f"the field {field!r} cannot be read ({value[UNREADABLE]})")
    if not isinstance(value, list):
        raise LayoutError(f"{field if ' ' in field else f'the field {field!r}'} is not text")
    parts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        held = part.get("text") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(held, str):
            raise LayoutError(
                f"{field} holds a part of type {kind!r}: images, sound and files are not read, only text is"
            )
        parts.append(held)
    return "".join(parts)


def _pair_layout(prompt: str, answer: str, *, more: str = "", name: str = "") -> Layout:
    return Layout(
        name or f"{prompt}/{answer}",
        (prompt, answer),
        partial(_pair, prompt=prompt, answer=answer, more=more),
        "prompt and answer",
        (more,) if more else (),
    )


CHOSEN = "the chosen side of each pair is used, the rejected one is not"
WHOLE_TEXT = "raw text without a prompt: the loss is taken on all of it but its first token"

LAYOUTS: tuple[Layout, ...] = (
    Layout("preference", ("chosen", "rejected"), _preference, "preference", _ASKED, CHOSEN),
    Layout("messages", ("messages",), partial(_messages, field="messages"), "messages"),
    Layout("conversations", ("conversations",), partial(_messages, field="conversations"), "messages"),
    Layout("conversation", ("conversation",), partial(_messages, field="conversation"), "messages"),
    _pair_layout("prompt", "completion"),
    _pair_layout("prompt", "response"),
    _pair_layout("instruction", "output", more="input", name="alpaca"),
    _pair_layout("instruction", "response", more="context"),
    _pair_layout("question", "answer"),
    _pair_layout("question", "response"),
    _pair_layout("query", "response"),
    _pair_layout("query", "answer"),
    _pair_layout("problem", "solution"),
    Layout("text", ("text",), _raw_text, "text", (), WHOLE_TEXT),
)

QUESTIONS = (
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "question",
    "instruction",
    "query",
    "problem",
)
"""Fields that hold what is to be answered, for rows without an answer."""


def read_question(row: Row) -> Conversation | None:
    """A row without an answer, as it waits for one; None where no field holds a question."""
    for field in QUESTIONS:
        value = row.get(field)
        if value is None:
            continue
        if isinstance(value, list) and not _is_parts(value):
            return _messages(row, field)
        more = "" if field != "instruction" else "input" if row.get("input") else "context"
        question = _required(value, field)
        added = _text(row[more], more) if more and row.get(more) is not None else ""
        content = f"{question}\n\n{added}" if added.strip() else question
        return Conversation((*_before(row), Turn(role="user", content=content)), _tools(row))
    return None


def known_layouts() -> str:
    """The layouts in one line, for messages."""
    return "; ".join(" and ".join(layout.needs) for layout in LAYOUTS)
