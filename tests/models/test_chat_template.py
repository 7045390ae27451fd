"""Chat templates come with a model: an honest one renders as transformers would, a hostile one is stopped."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorasmith.errors import CheckpointError, DataError
from lorasmith.models import chat_template
from lorasmith.models.text import conversation_tokens, frame, prompt_tokens, render_prompt
from tests.tiny import save_base

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EACH = "{% for m in messages %}"
TEMPLATES = {
    "ChatML": CHATML,
    "special tokens": "{{ bos_token }}" + EACH + "{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ {'é': 1} | tojson(indent=2) }}",
    "loop controls": EACH + "{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set n = namespace(a='') %}" + EACH + "{% set n.a = m.role %}{% endfor %}{{ n.a }}",
    "generation": EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_base(tmp_path_factory.mktemp("chat") / "base"))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("start_answer", [False, True])
def test_an_honest_template_renders_as_transformers_does(
    tokenizer: Any, name: str, start_answer: bool
) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    messages = [
        {"role": "system", "content": "Be brief. “é” \u2028 {{ 1 + 1 }}"},
        {"role": "user", "content": "  what is\n<|im_end|> this?\t"},
    ]
    text = chat_template.render(tokenizer, messages, start_answer=start_answer)
    assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=start_answer, tokenize=False)


def test_tokens_are_those_of_transformers(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    around = frame(tokenizer, "chat", end_of_turn=False)
    for text in ("a", "def f(x):\n    return x", "é – 模型"):
        messages = [{"role": "user", "content": text}]
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        assert prompt_tokens(tokenizer, text, around) == expected
        assert conversation_tokens(tokenizer, messages, around) == expected


HOSTILE = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 3 ** (10 ** 8) }}",
    "a power, when told to": "{% if 'now' in messages[0]['content'] %}{{ 3 ** (10 ** 8) }}{% endif %}",
}
GREEDY = {
    "a large range": "{% for i in range(10**12) %}x{% endfor %}",
    "a long text": "{{ 'a' * 10**12 }}",
    "growing": "{% set n = namespace(a='a') %}{% for i in range(9) %}{% set n.a = n.a*99 %}{% endfor %}",
    "a long line": "{{ 'a' | center(10**11) }}",
    "a long list": "{{ [0] * 10**11 }}",
    "deep brackets": "{{ " + "(" * 100_000 + " }}",
    "a way out": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "no template": "{% for %}",
    "its own message": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_an_end_is_stopped(
    tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "_renderers", {})
    tokenizer.chat_template = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="does not come to an end"):
        render_prompt(tokenizer, "now")
    assert (
        time.monotonic() - began < 60
    )  # half a second of processor time, on a machine that others use as well
    tokenizer.chat_template = CHATML
    assert render_prompt(tokenizer, "a").endswith("assistant\n")


@pytest.mark.parametrize("name", GREEDY)
def test_a_template_that_cannot_be_rendered_is_one_message(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = GREEDY[name]
    with pytest.raises(CheckpointError, match="chat template does not"):
        render_prompt(tokenizer, "a")
    around = chat_frame(tokenizer)
    with pytest.raises((CheckpointError, DataError), match="chat template"):
        conversation_tokens(tokenizer, [{"role": "user", "content": "a"}], around)


def chat_frame(tokenizer: Any) -> Any:
    """What a tokenizer with a harmless template is framed by."""
    given, tokenizer.chat_template = tokenizer.chat_template, CHATML
    try:
        return frame(tokenizer, "chat", end_of_turn=False)
    finally:
        tokenizer.chat_template = given


def test_a_template_keeps_nothing_from_one_rendering_to_the_next(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% set count = (count or 0) + 1 %}{{ count }}"
    assert [render_prompt(tokenizer, "a") for _ in range(3)] == ["1", "1", "1"]


def test_modules_of_the_folder_one_works_in_are_not_taken(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("transformers", "lorasmith", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat_template, "_renderers", {})
    tokenizer.chat_template = CHATML
    assert render_prompt(tokenizer, "a")
    chat_template._renderers[os.getpid()].stop()
    assert not (tmp_path / "ran").exists()
