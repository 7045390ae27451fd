"""Chat: answers of plain generate as they come, history, side by side with what differs marked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith
from lorasmith.cli.chat import _talk
from lorasmith.cli.console import console
from lorasmith.errors import DataError, UsageError
from lorasmith.followup.chat import (
    AnswerStretch,
    mark_differences,
    mark_tokens,
    open_chat,
    open_side_by_side,
)
from lorasmith.options import ChatOptions
from lorasmith.visible import visible
from tests.tiny import load_model, save_adapter, save_base, tiny_tokenizer
from tests.typed import Typed

SHORT = ChatOptions(max_new_tokens=10)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_base(folder / "base", dtype=torch.float32)
    save_base(folder / "draft", dtype=torch.float32, num_hidden_layers=1)
    save_base(folder / "plain", dtype=torch.float32, chat=False)
    save_adapter(folder / "adapter", folder / "base")
    lorasmith.merge(folder / "base", folder / "adapter", folder / "merged", precision="float32")
    return folder


def expected(folder: Path, messages: list[dict[str, str]], adapter: Path | None = None) -> str:
    model: Any = load_model(folder)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = tiny_tokenizer()
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=10, do_sample=False, eos_token_id=[2, 4], pad_token_id=0)
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_a_conversation_is_what_generate_gives_for_all_of_it(place: Path) -> None:
    chat = open_chat(place / "base", options=ChatOptions(system="be brief", max_new_tokens=10))
    pieces = list(chat.answer("the cat"))
    first = "".join(pieces)
    assert len(pieces) > 3  # it streams
    told = [turn("system", "be brief"), turn("user", "the cat")]
    assert first == expected(place / "base", told)
    told += [turn("assistant", first), turn("user", "and then")]
    assert "".join(chat.answer("and then")) == expected(place / "base", told)
    chat.reset()
    assert "".join(chat.answer("the cat")) == first


def test_a_draft_changes_the_speed_only(place: Path) -> None:
    chat = open_chat(place / "base", draft=place / "draft", options=SHORT)
    assert "".join(chat.answer("on the mat")) == expected(place / "base", [turn("user", "on the mat")])
    with pytest.raises(UsageError, match="greedy"):
        open_chat(place / "base", draft=place / "draft", options=ChatOptions(temperature=1.0))


def test_what_was_said_before_an_interruption_is_remembered(place: Path) -> None:
    chat = open_chat(place / "base", options=SHORT)
    answer = chat.answer("the cat")
    said = [next(answer), next(answer)]
    answer.close()
    assert chat.messages[-1] == turn("assistant", "".join(said))


def test_sampling_follows_its_seed(place: Path) -> None:
    def say(seed: int) -> str:
        options = ChatOptions(temperature=1.5, seed=seed, max_new_tokens=10)
        return "".join(open_chat(place / "base", options=options).answer("a"))

    assert say(1) == say(1) != say(2)


def test_side_by_side_shows_the_adapter_the_base_and_the_merged_model(place: Path) -> None:
    chats = open_side_by_side(place / "base", place / "adapter", place / "merged", options=SHORT)
    told = [turn("user", "over there")]
    answers = {chat.name: "".join(chat.answer("over there")) for chat in chats}
    assert list(answers) == ["adapter", "base", "merged"]
    assert answers["base"] == expected(place / "base", told)
    assert answers["adapter"] == expected(place / "base", told, place / "adapter")
    assert answers["merged"] == answers["adapter"] != answers["base"]
    adapter, base, merged = chats
    assert not any(piece.differs for piece in mark_differences(adapter, merged))
    assert any(piece.differs for piece in mark_differences(adapter, base))


def test_differing_tokens_are_marked_and_no_others() -> None:
    def decode(tokens: list[int]) -> str:
        return "".join(f"{token} " for token in tokens)

    assert mark_tokens([1, 2, 3, 4], [1, 9, 3, 4], decode) == [
        AnswerStretch("1 ", False),
        AnswerStretch("9 ", True),
        AnswerStretch("3 4 ", False),
    ]
    assert mark_tokens([1, 2], [1, 2], decode) == [AnswerStretch("1 2 ", False)]
    assert mark_tokens([1, 2, 3], [1], decode) == [AnswerStretch("1 ", False), AnswerStretch("", True)]


def test_a_model_without_a_chat_template_is_told_what_to_do(place: Path) -> None:
    with pytest.raises(UsageError, match="no chat template") as raised:
        open_chat(place / "plain")
    assert "--template plain" in str(raised.value)
    plain = open_chat(place / "plain", options=ChatOptions(template="plain", max_new_tokens=4))
    assert "".join(plain.answer("the cat"))


def test_a_conversation_longer_than_the_context_is_told(place: Path) -> None:
    chat = open_chat(place / "base", options=SHORT)
    with pytest.raises(DataError, match="/reset"):
        list(chat.answer("word " * 100))


def test_a_session_in_the_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["the cat", "", "/reset", "the cat", "word " * 100])

    def type_next(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None  # Ctrl-D

    monkeypatch.setattr("builtins.input", type_next)
    _talk([open_chat(place / "base", options=SHORT)], console())
    said = visible(expected(place / "base", [turn("user", "the cat")]))
    shown = capsys.readouterr().out
    assert shown.count(said) == 2
    assert "type /reset" in shown


def command(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorasmith.cli.main", "chat", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_reads_standard_input(place: Path, here: Typed) -> None:
    done = command("--model", place / "base", "--max-new-tokens", "10", text="the cat")
    assert done.returncode == 0, done.stderr
    assert done.stdout == visible(expected(place / "base", [turn("user", "the cat")])) + "\n"
    done = here("chat", "--model", place / "plain", "--prompt", "x")
    assert (done.returncode, "no chat template" in done.stderr) == (2, True)


def test_the_command_marks_what_differs(place: Path, here: Typed) -> None:
    common = ("--model", place / "base", "--adapter", place / "adapter", "--merged", place / "merged")
    done = here("chat", *common, "--side-by-side", "--prompt", "over there", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert "merged: the adapter's tokens" in done.stdout
    assert "⟦" in done.stdout.split("merged")[0]


def test_the_merged_folder_loads_as_the_servers_load_it(place: Path) -> None:
    """`transformers serve` and vLLM load a folder by its config, tokenizer and chat template alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(
        place / "merged", dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(place / "merged")
    ids = tokenizer.apply_chat_template(
        [turn("user", "over there")], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=10, do_sample=False, eos_token_id=[2, 4], pad_token_id=0)
    text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == expected(place / "base", [turn("user", "over there")], place / "adapter")
