"""Conversations as token ids: any number of turns, a system prompt where one is wanted."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from lorasmith.errors import DataError, UsageError
from lorasmith.models.template import Frame, prompt_tokens

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": …}`."""


def conversation_tokens(tokenizer: Any, messages: list[Message], around: Frame) -> list[int]:
    """Token ids up to where the assistant begins to write.

    Without a chat template only a single user message has a meaning: it is the text to be continued. Raises
    `DataError` for what the template cannot lay out.
    """
    if around.template == "plain":
        if len(messages) != 1:
            raise DataError(
                "a conversation of several messages needs a chat template",
                expected="one user message",
                remedy="add chat_template.jinja to the model folder, or give rows with a prompt each",
            )
        return prompt_tokens(tokenizer, messages[0]["content"], around)
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"the chat template refuses these messages: {str(error).strip()}",
            where=getattr(tokenizer, "name_or_path", None),
            remedy="bring the roles into the order that the template wants, or leave out the system prompt",
        ) from error
    return list(encoded["input_ids"])


def require_chat(tokenizer: Any, what: str) -> None:
    """Raise `UsageError` for a tokenizer without a chat template; `what` is what needs one."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"the model has no chat template, so {what} is not possible",
            where=getattr(tokenizer, "name_or_path", None),
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            remedy="copy the template from the instruct version of the model, "
            "or give --template plain to have the text continued",
        )
