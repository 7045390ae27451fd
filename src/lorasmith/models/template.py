"""How a prompt is put to the model, and which token ends its answer: read off the tokenizer, not guessed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lorasmith.errors import CheckpointError, DataError, UsageError

TEMPLATES = ("auto", "chat", "plain")

_MARK = "lorasmithmark"
"""Stands for the answer while the template is examined; plain letters survive every template's trimming."""


def resolve_template(tokenizer: Any, asked: str) -> str:
    """`chat` where the tokenizer has a chat template, else `plain`, unless one of them is asked for.

    Raises `UsageError` for an unknown name, or for `chat` without a chat template.
    """
    if asked not in TEMPLATES:
        raise UsageError(f"there is no template {asked!r}", expected=" | ".join(TEMPLATES))
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if asked == "chat" and not has_chat:
        raise UsageError(
            "the tokenizer has no chat template",
            where=getattr(tokenizer, "name_or_path", None),
            remedy="give --template plain, or add chat_template.jinja to the model folder",
        )
    if asked == "auto":
        return "chat" if has_chat else "plain"
    return asked


def render_prompt(tokenizer: Any, prompt: str) -> str:
    """The chat template's text for one user message, up to where the assistant begins to write."""
    return _render(tokenizer, [{"role": "user", "content": prompt}], start_answer=True)


def _render(tokenizer: Any, messages: list[dict[str, str]], *, start_answer: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=start_answer, tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the chat template does not render: {error}",
            where=getattr(tokenizer, "name_or_path", None),
            expected="a template for one user message",
            remedy="give --template plain, or repair chat_template.jinja",
        ) from error
    return str(text)


@dataclass(frozen=True)
class Frame:
    """What surrounds the prompt and the response under one template."""

    template: str
    """`chat` or `plain`."""
    first: tuple[int, ...]
    """BOS before a plain prompt, where the tokenizer puts one; a chat template writes its own."""
    last: int | None
    """The token that ends the response; None where it is not wanted."""
    keeps_spaces: bool
    """False for a tokenizer that puts a space before every text (SentencePiece's dummy prefix)."""


def frame(tokenizer: Any, template: str, *, end_of_turn: bool) -> Frame:
    """Examine the tokenizer once; raises `CheckpointError` where an end token is wanted and there is none."""
    resolved = resolve_template(tokenizer, template)
    bos = tokenizer.bos_token_id
    first = (
        (bos,) if resolved == "plain" and bos is not None and bos in tokenizer("a")["input_ids"][:1] else ()
    )
    last = end_token(tokenizer, resolved) if end_of_turn else None
    spelled = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    return Frame(resolved, first, last, keeps_spaces=not spelled[0].startswith("▁"))


def end_token(tokenizer: Any, template: str) -> int:
    """The token with which a finished response ends: the first special token after it, else EOS.

    Templates write `<|im_end|>`, `<|eot_id|>`, … there, which often is not the EOS of the tokenizer.
    """
    if template == "chat":
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        _, mark, rest = _render(tokenizer, messages, start_answer=False).rpartition(_MARK)
        if not mark:
            raise CheckpointError(
                "the chat template does not write the assistant's answer",
                where=getattr(tokenizer, "name_or_path", None),
                remedy="give --template plain, or repair chat_template.jinja",
            )
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        for token in tokenizer(rest, add_special_tokens=False)["input_ids"]:
            if token in special:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            "neither the chat template nor the tokenizer has a token that ends a response",
            where=getattr(tokenizer, "name_or_path", None),
            remedy="give --no-end-of-turn, or set eos_token in tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def prompt_tokens(tokenizer: Any, prompt: str, around: Frame) -> list[int]:
    """Token ids of the prompt as the model gets it before it answers; BOS at most once."""
    if around.template == "plain":
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids if tuple(ids[:1]) == around.first else [*around.first, *ids]
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def response_tokens(tokenizer: Any, response: str, around: Frame) -> list[int]:
    """Token ids of the response alone, its leading spaces as they are.

    A tokenizer with a dummy prefix would add one space; after a chat prompt that is how the model writes,
    but a plain response continues the prompt's text, so there it is encoded behind a line break, which is
    cut off.
    """
    if around.keeps_spaces or around.template == "chat":
        return list(tokenizer(response, add_special_tokens=False)["input_ids"])
    anchor = tokenizer("\n", add_special_tokens=False)["input_ids"]
    joined = tokenizer("\n" + response, add_special_tokens=False)["input_ids"]
    if joined[: len(anchor)] != anchor:
        raise DataError(
            "the response cannot be encoded on its own: the tokenizer joins it with a line break before it",
            expected="a tokenizer that keeps line breaks apart",
            remedy="give --template chat",
        )
    return list(joined[len(anchor) :])
