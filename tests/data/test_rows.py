"""Rows of every layout become the same examples; what cannot be read is one message with the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.data.rows import Reading, iterate_rows, read_rows
from lorasmith.data.sources import prepare
from lorasmith.errors import DataError
from lorasmith.files.jsonl import write_rows
from lorasmith.records.dataset import Example

Row = dict[str, Any]
SYSTEM, ASKED, SAID = "Be brief.", "Weather in Bonn?", "It rains."


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


PLAIN: dict[str, Row] = {
    "messages": {"messages": [user(ASKED), assistant(SAID)]},
    "messages as text": {"messages": json.dumps([user(ASKED), assistant(SAID)])},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, assistant(SAID)]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    "prompt as messages": {"prompt": [user(ASKED)], "completion": [assistant(SAID)]},
    "prompt, completion": {"prompt": ASKED, "completion": SAID},
    "prompt, response": {"prompt": ASKED, "response": SAID},
    "alpaca": {"instruction": ASKED, "input": "", "output": SAID},
    "question, answer": {"question": ASKED, "answer": SAID},
    "query, response": {"query": ASKED, "response": SAID},
    "problem, solution": {"problem": ASKED, "solution": SAID},
    "instruction, response": {"instruction": ASKED, "response": SAID, "context": ""},
    "preference": {"prompt": ASKED, "chosen": SAID, "rejected": "No."},
    "preference of messages": {"chosen": [user(ASKED), assistant(SAID)], "rejected": [user(ASKED)]},
    "preference of dpo": {"question": ASKED, "chosen": SAID, "rejected": "No."},
    "preference as speech": {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {SAID}", "rejected": "x"},
}
WITH_SYSTEM: dict[str, Row] = {
    "messages": {"messages": [{"role": "system", "content": SYSTEM}, user(ASKED), assistant(SAID)]},
    "a field beside messages": {"system": SYSTEM, "messages": [user(ASKED), assistant(SAID)]},
    "alpaca": {"system": SYSTEM, "instruction": ASKED, "output": SAID},
    "openorca": {"system_prompt": SYSTEM, "question": ASKED, "response": SAID},
    "prompt": {"system": SYSTEM, "prompt": ASKED, "response": SAID},
}


def write(folder: Path, *rows: Row) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(folder: Path, row: Row) -> Example:
    (example,) = read_rows(write(folder, row)).examples
    return example


@pytest.mark.parametrize("row", PLAIN.values(), ids=PLAIN.keys())
def test_a_question_and_its_answer_are_the_same_in_every_layout(tmp_path: Path, row: Row) -> None:
    example = one(tmp_path, row)
    assert (example.prompt, example.response, example.messages) == (ASKED, SAID, ())


@pytest.mark.parametrize("row", WITH_SYSTEM.values(), ids=WITH_SYSTEM.keys())
def test_a_system_prompt_is_never_dropped(tmp_path: Path, row: Row) -> None:
    turns = [(turn.role, turn.content) for turn in one(tmp_path, row).messages]
    assert turns == [("system", SYSTEM), ("user", ASKED), ("assistant", SAID)]


def test_earlier_turns_and_inputs_are_read(tmp_path: Path) -> None:
    row = {"instruction": "And in French?", "history": [["Hello in German", "Hallo"]], "output": "Bonjour"}
    turns = [turn.content for turn in one(tmp_path, row).messages]
    assert turns == ["Hello in German", "Hallo", "And in French?", "Bonjour"]
    with_input = {"instruction": "Translate.", "input": "Hello", "output": "Hallo"}
    assert one(tmp_path, with_input).prompt == "Translate.\n\nHello"


def test_tools_calls_reasoning_and_flags_are_kept(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"at": "Bonn"}'}}
    row = {
        "messages": [
            user(ASKED),
            assistant(None, tool_calls=[call], weight=0),  # type: ignore[arg-type]
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
            assistant(SAID, reasoning_content="The tool says rain.", weight=1),
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "weather"}}]),
    }
    example = one(tmp_path, row)
    called = example.messages[1]
    assert called.tool_calls[0]["function"] == {"name": "weather", "arguments": {"at": "Bonn"}}
    assert [turn.train for turn in example.messages] == [None, False, None, True]
    assert example.messages[3].reasoning_content == "The tool says rain."
    assert example.tools[0]["function"]["name"] == "weather"
    legacy = {
        "messages": [
            user(ASKED),
            assistant("", function_call={"name": "f", "arguments": "{}"}),
            user("?"),
            assistant(SAID),
        ]
    }
    assert one(tmp_path, legacy).messages[1].tool_calls[0]["function"]["name"] == "f"


def test_raw_text_and_preferences_say_how_they_are_used(tmp_path: Path) -> None:
    text = read_rows(write(tmp_path, {"text": "Once upon a time."}))
    assert text.examples[0].is_text and "all of it" in text.findings[0].message
    pair = read_rows(write(tmp_path, PLAIN["preference"]))
    assert "chosen side" in pair.findings[0].message


def test_fields_that_are_not_read_are_named_wherever_they_first_stand(tmp_path: Path) -> None:
    rows = read_rows(
        write(tmp_path, {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b", "hint": "c"})
    )
    assert [one.code for one in rows.findings] == ["fields-not-read"] and "hint" in rows.findings[0].message
    chosen = Reading(columns={"prompt": "q", "response": "a"})
    rows = read_rows(write(tmp_path, {"q": "x", "a": "y", "system": "z"}), chosen)
    assert "system" in rows.findings[0].message


IMAGE = {"role": "user", "content": [{"type": "image_url"}]}
BROKEN_CALL = assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])
REFUSED: dict[str, tuple[Row, str]] = {
    "unknown layout": ({"frage": "a", "antwort": "b"}, "no prompt and response .* fields are antwort, frage"),
    "an empty turn": ({"messages": [user(ASKED), assistant(" ")]}, "message 2 .assistant. is empty"),
    "two answers": ({"messages": [user(ASKED), assistant("a"), assistant("b")]}, "2 and 3 are both from"),
    "an unknown role": ({"messages": [{"role": "narrator", "content": "x"}, assistant("b")]}, "unknown role"),
    "no answer": ({"messages": [user(ASKED)]}, "no message is from the assistant"),
    "a question at the end": ({"messages": [user("a"), assistant("b"), user("c")]}, "its answer is missing"),
    "too many turns": ({"messages": [user("a"), assistant("b")] * 5000}, "10,000 messages"),
    "an image": ({"messages": [IMAGE, assistant("b")]}, "images"),
    "an image beside": ({"messages": [user("a"), assistant("b")], "images": ["x.png"]}, "images"),
    "two system prompts": (
        {"system": "one", "messages": [{"role": "system", "content": "two"}, user("a"), assistant("b")]},
        "begins with another",
    ),
    "a system prompt in the middle": (
        {"messages": [user("a"), {"role": "system", "content": "b"}, assistant("c")]},
        "may only stand first",
    ),
    "metadata that is no object": ({"prompt": "a", "response": "b", "metadata": "x"}, "metadata"),
    "a domain that is no text": ({"prompt": "a", "response": "b", "metadata": {"domain": 5}}, "domain"),
    "a question that is a number": ({"prompt": 3, "response": "b"}, "'prompt' is not text"),
    "a broken tool call": ({"messages": [user("a"), BROKEN_CALL]}, "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_one_message_with_the_row(tmp_path: Path, row: Row, told: str) -> None:
    good = {"prompt": "a", "response": "b"} if "prompt" in row else {"messages": [user("a"), assistant("b")]}
    with pytest.raises(DataError, match=told) as caught:
        read_rows(write(tmp_path, *([] if told.startswith("no prompt") else [good]), row))
    assert (caught.value.where or "").endswith(("rows.jsonl:1", "rows.jsonl:2"))
    assert caught.value.remedy


def test_rows_that_cannot_be_used_are_set_aside_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    good = {"id": "one", "messages": [user("a"), assistant("b")]}
    bad = {"messages": [user("a")]}
    twice = {"id": "one", "messages": [user("c"), assistant("d")]}
    rows = read_rows(write(tmp_path, good, bad, twice), skip=True)
    assert len(rows.examples) == 1 and [number for number, _ in rows.faults] == [2, 3]
    (finding,) = rows.findings
    assert "2 rows of 3" in finding.message and "row 2" in finding.message


def test_layouts_that_say_different_things_do_not_mix(tmp_path: Path) -> None:
    mixed = write(tmp_path, {"messages": [user("a"), assistant("b")]}, {"prompt": "a", "response": "b"})
    with pytest.raises(DataError, match="'prompt/response', the first one of 'messages'") as caught:
        read_rows(mixed)
    assert str(caught.value.where).endswith(":2")
    related = write(tmp_path, {"instruction": "a", "output": "b"}, {"prompt": "c", "response": "d"})
    assert [one.code for one in read_rows(related).findings] == ["layouts"]


def test_columns_name_what_no_layout_knows(tmp_path: Path) -> None:
    reading = Reading(columns={"prompt": "frage", "response": "antwort", "id": "nr"})
    rows = read_rows(write(tmp_path, {"nr": 7, "frage": ASKED, "antwort": SAID}), reading)
    assert (rows.examples[0].id, rows.examples[0].prompt, rows.examples[0].response) == ("7", ASKED, SAID)
    wrong = Reading(columns={"prompt": "frage", "response": "nichts"})
    with pytest.raises(DataError, match="there is no column 'nichts'"):
        read_rows(write(tmp_path, {"frage": "a", "antwort": "b"}), wrong)


def test_ids_are_the_rows_own_and_never_clash_with_row_numbers(tmp_path: Path) -> None:
    rows = read_rows(
        write(tmp_path, {"id": "2", "prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"})
    )
    assert [example.id for example in rows.examples] == ["2", "row 2"]
    with pytest.raises(DataError, match="'x' stands in row 1 as well"):
        read_rows(write(tmp_path, *[{"id": "x", "prompt": "a", "response": "b"}] * 2))


def test_a_row_that_waits_for_its_answer_needs_none(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("a"), assistant("b"), user("c"), assistant("the answer it was made for")]},
        {"question": "why?"},
        {"instruction": "Sum up.", "context": "Rain fell."},
    ]
    read = list(iterate_rows(write(tmp_path, *rows), Reading(answered=False)))
    asked = [[turn.content for turn in row.example.messages] for row in read[:1] if row.example]
    assert asked == [["a", "b", "c"]]
    (alone,) = iterate_rows(write(tmp_path, rows[2]), Reading(answered=False))
    assert alone.example is not None and alone.example.messages[0].content == "Sum up.\n\nRain fell."


def test_an_id_that_was_made_gives_way_to_a_later_row_that_has_it(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"id": "1", "prompt": "c", "response": "d"}]
    path = write(tmp_path, *rows)
    assert [one.id for one in read_rows(path).examples] == ["row 1", "1"]
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "a.jsonl", rows[:1])
    write_rows(folder / "b.jsonl", [{"id": "a.jsonl:1", "prompt": "c", "response": "d"}])
    names = [(one.id, one.prompt) for one in read_rows(prepare(folder)).examples]
    assert names == [("row a.jsonl:1", "a"), ("a.jsonl:1", "c")]


def test_fields_of_messages_that_are_not_read_are_told(tmp_path: Path) -> None:
    odd = {**assistant(SAID, score=0.5), "annotations": []}
    path = write(tmp_path, {"messages": [user(ASKED), odd], "tools": []})
    told = [one.message for one in read_rows(path).findings if one.code == "fields-not-read"]
    assert told == ["layout messages: the fields messages[].score are not read"]


def test_a_history_stands_behind_the_system_prompt_of_the_messages(tmp_path: Path) -> None:
    row = {
        "history": [["hi", "hello"]],
        "messages": [{"role": "system", "content": SYSTEM}, user(ASKED), assistant(SAID)],
    }
    (one,) = read_rows(write(tmp_path, row)).examples
    assert [turn.role for turn in one.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.content for turn in one.turns] == [SYSTEM, "hi", "hello", ASKED, SAID]


def test_tools_count_towards_what_may_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "x" * 5_000}}
    path = write(tmp_path, {"messages": [user(ASKED), assistant(SAID)], "tools": [tool]})
    read_rows(path)
    monkeypatch.setattr("lorasmith.data.rows.MOST_CHARACTERS", 4_000)
    with pytest.raises(DataError, match="hold more than"):
        read_rows(path)
