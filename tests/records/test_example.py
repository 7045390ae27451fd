"""One row in its three kinds: what is written is what is read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lorasmith.records.dataset import Example

METADATA = {"source": "chats"}
CONVERSATION: dict[str, Any] = {
    "id": "7",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Bonn?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "weather", "arguments": {"at": "Bonn"}}],
        },
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "train": True},
    ],
    "tools": [{"type": "function", "function": {"name": "weather"}}],
    "metadata": METADATA,
}


def test_a_conversation_is_written_by_its_messages_and_read_back_equal() -> None:
    example = Example.model_validate(CONVERSATION)
    row = example.model_dump(mode="json")
    assert row["messages"] == CONVERSATION["messages"] and row["tools"] == CONVERSATION["tools"]
    assert "prompt" not in row and "response" not in row
    assert Example.model_validate(row) == example
    assert example.response == "It rains."
    assert example.prompt.startswith("system: Be brief.\n\nuser: Weather in Bonn?\n\nassistant: {")
    assert "train" not in example.turns[-1].message()
    assert example.turns[2].message()["tool_calls"][0]["name"] == "weather"


def test_conversations_that_differ_in_an_earlier_turn_are_no_copies() -> None:
    other = {
        **CONVERSATION,
        "messages": [{"role": "system", "content": "Be long."}, *CONVERSATION["messages"][1:]],
    }
    assert Example.model_validate(CONVERSATION).content != Example.model_validate(other).content


def test_a_prompt_and_its_response_keep_their_four_fields() -> None:
    row = {"id": "1", "prompt": "2+2?", "response": "4", "metadata": METADATA}
    example = Example.model_validate(row)
    assert list(example.model_dump(mode="json")) == ["id", "prompt", "response", "metadata"]
    assert [turn.message() for turn in example.turns] == [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    assert not example.is_text


def test_raw_text_is_written_as_text() -> None:
    example = Example.model_validate({"id": "1", "text": "Once upon a time.", "metadata": METADATA})
    assert example.is_text and example.turns == () and example.response == "Once upon a time."
    row = example.model_dump(mode="json")
    assert list(row) == ["id", "text", "metadata"] and Example.model_validate(row) == example


def test_a_message_without_a_role_is_refused() -> None:
    with pytest.raises(ValidationError, match="role"):
        Example.model_validate({**CONVERSATION, "messages": [{"content": "hello"}]})
