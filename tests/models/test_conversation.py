"""Where the assistant's answers stand in what chat templates of several kinds make of a conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorasmith.data.rows import read_examples
from lorasmith.errors import DataError
from lorasmith.models import chat_template
from lorasmith.models.conversation import MANY_ANSWERS, Wording, write_script
from lorasmith.models.text import Manner, encode_example, encode_examples, frame
from lorasmith.records.dataset import Example, Turn
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

HEADERS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|head|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|head|>\n\n{% endif %}"
)
"""As Llama 3 writes turns: no line break behind one, two within its head."""
SLASHES = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
"""As early Mistral models write them: nothing begins an answer, and other roles are refused."""
THINKS = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %} <call>{{ call.function.name }}</call>{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""As Qwen3 writes them: what was thought before the last question is left out."""
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant\n"
    "{% generation %}{{ m.content }}<|end|>\n{% endgeneration %}"
    "{% else %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer_of(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def row(*turns: tuple[str, str], **more: Any) -> Example:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Example.model_validate({"id": "row", "messages": messages, "metadata": {"source": "s"}} | more)


TALK = row(
    ("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "and now"), ("assistant", "bye")
)
ASKED = row(("user", "hi"), ("assistant", "hello"), ("user", "and now"), ("assistant", "bye"))


@pytest.mark.parametrize(
    ("template", "example", "answers", "way"),
    [
        (CHAT_TEMPLATE, TALK, ["hello<|end|>", "bye<|end|>"], "prefixes"),
        (HEADERS, TALK, ["hello<|end|>", "bye<|end|>"], "prefixes"),
        (THINKS, TALK, ["hello<|end|>", "bye<|end|>"], "prefixes"),
        (MARKED, TALK, ["hello<|end|>", "bye<|end|>"], "marks"),
        (SLASHES, ASKED, [" hello</s>", " bye</s>"], "prefixes"),
    ],
)
def test_every_answer_is_found_with_what_ends_its_turn(
    template: str, example: Example, answers: list[str], way: str
) -> None:
    script = write_script(tokenizer_of(template), example, Wording(), last_only=False)
    assert [script.text[one.start : one.stop] for one in script.answers] == answers
    assert [one.number for one in script.answers] == [1, 2]
    assert script.found_by == way


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, HEADERS, THINKS, SLASHES])
def test_answers_of_a_long_conversation_are_found_by_their_contents_and_are_the_same(template: str) -> None:
    count = MANY_ANSWERS
    turns = [turn for n in range(count) for turn in (("user", f"ask {n}"), ("assistant", f"say {n}"))]
    script = write_script(tokenizer_of(template), row(*turns), Wording(), last_only=False)
    end = "</s>" if template is SLASHES else "<|end|>"
    found = [script.text[one.start : one.stop].strip() for one in script.answers]
    assert found == [f"say {n}{end}" for n in range(count)]
    assert script.found_by == "contents"


def test_earlier_answers_of_a_template_that_leaves_reasoning_out_are_scored_as_they_stand() -> None:
    turns = (
        Turn(role="user", content="hi"),
        Turn(role="assistant", content="hello", reasoning_content="greet"),
        Turn(role="user", content="and now"),
        Turn(role="assistant", content="bye", reasoning_content="part"),
    )
    example = Example(id="row", prompt="p", response="bye", messages=turns, metadata={"source": "s"})
    tokenizer = tokenizer_of(THINKS)
    script = write_script(tokenizer, example, Wording(), last_only=False)
    assert "greet" not in script.text
    assert "part" in script.text
    found = [script.text[one.start : one.stop] for one in script.answers]
    assert found == ["hello<|end|>", "<think>\npart\n</think>\n\nbye<|end|>"]
    last = write_script(tokenizer, example, Wording(), last_only=True)
    assert last.text[last.answers[0].start : last.answers[0].stop] == "<think>\npart\n</think>\n\nbye<|end|>"


def test_only_the_assistants_tokens_are_scored() -> None:
    for template in (CHAT_TEMPLATE, HEADERS, MARKED):
        tokenizer = tokenizer_of(template)
        manner = Manner(frame(tokenizer, "chat", end_of_turn=True), loss_on="assistant")
        for boundary in ("generation", "text"):
            encoded = encode_example(TALK, tokenizer, Manner(manner.around, "assistant", boundary))
            told = [tokenizer.decode(encoded.ids[start:stop]) for start, stop in encoded.spans]
            # To the letter of the marks in a trainer's tokens, the line break behind a turn included.
            more = "\n" if template is MARKED and boundary == "text" else ""
            assert told == [f"hello<|end|>{more}", f"bye<|end|>{more}"], (template, boundary)
            assert encoded.turns == (1, 2)


def read_one(messages: list[dict[str, Any]], folder: Path) -> Example:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    return read_examples(file)[0]


def test_a_turn_that_the_row_marks_as_not_learnt_is_left_out(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "weight": 0},
        {"role": "user", "content": "and now"},
        {"role": "assistant", "content": "bye"},
    ]
    example = read_one(messages, tmp_path)
    tokenizer = tokenizer_of(CHAT_TEMPLATE)
    manner = Manner(frame(tokenizer, "chat", end_of_turn=True), loss_on="assistant")
    encoded = encode_example(example, tokenizer, manner)
    assert encoded.turns == (2,)
    assert tokenizer.decode(encoded.targets) == "bye<|end|>"


def test_a_refused_system_prompt_names_the_row_and_the_templates_own_words() -> None:
    with pytest.raises(DataError, match="only user and assistant roles") as error:
        write_script(tokenizer_of(SLASHES), TALK, Wording(), last_only=True)
    assert error.value.where == "example 'row'"
    with pytest.raises(DataError, match="only user and assistant roles"):
        write_script(tokenizer_of(SLASHES), ASKED, Wording(system="be kind"), last_only=True)


def test_tool_calls_that_a_template_does_not_write_are_refused() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    turns = (
        Turn(role="user", content="rain?"),
        Turn(role="assistant", content="let me see", tool_calls=(call,)),
        Turn(role="user", content="so?"),
        Turn(role="assistant", content="no"),
    )
    example = Example(id="row", prompt="p", response="no", messages=turns, metadata={"source": "s"})
    with pytest.raises(DataError, match="leaves the call of the tool 'weather' out"):
        write_script(tokenizer_of(CHAT_TEMPLATE), example, Wording(), last_only=False)
    script = write_script(tokenizer_of(THINKS), example, Wording(), last_only=False)
    first = script.answers[0]
    assert script.text[first.start : first.stop] == "let me see <call>weather</call><|end|>"


def test_the_fifth_row_that_a_template_fails_on_is_the_one_that_is_named() -> None:
    template = CHAT_TEMPLATE.replace(
        "{% for",
        "{% if 'fifth' in messages[0].content %}{{ raise_exception('no fifth') }}{% endif %}{% for",
        1,
    )
    names = ["first", "second", "third", "fourth", "fifth", "sixth"]
    rows = [row(("user", name), ("assistant", "a"), id=name) for name in names]
    with pytest.raises(DataError, match="no fifth") as error:
        encode_examples(rows, tokenizer_of(template), max_length=1000)
    assert error.value.where == "example 'fifth'"


def test_a_long_conversation_is_rendered_a_few_times_and_not_once_for_each_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renderings: list[int] = []
    original = chat_template.render

    def counting(tokenizer: Any, messages: Sequence[Any], **how: Any) -> str:
        renderings.append(len(messages))
        return original(tokenizer, messages, **how)

    monkeypatch.setattr(chat_template, "render", counting)
    count = 5_000
    turns = [turn for n in range(count) for turn in (("user", f"ask {n}"), ("assistant", f"say {n}"))]
    script = write_script(tokenizer_of(CHAT_TEMPLATE), row(*turns), Wording(), last_only=False)
    assert len(script.answers) == count
    # By prefixes it would be two for each answer, of a text that grows with them.
    assert len(renderings) <= 4
