"""How a prompt is put to the model, and which token ends its answer: read off the tokenizer, not guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.errors import CheckpointError, DataError, UsageError
from lorasmith.models import chat_template
from lorasmith.models.chat_template import Message
from lorasmith.records.base import Finding
from lorasmith.records.dataset import Example

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
        return chat_template.render(tokenizer, messages, start_answer=start_answer)
    except chat_template.TemplateRefusal as error:
        raise CheckpointError(
            f"the chat template does not render: {error}",
            where=getattr(tokenizer, "name_or_path", None),
            expected="a template for one user message",
            remedy="give --template plain, or repair chat_template.jinja",
        ) from error


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
    return _text_tokens(tokenizer, render_prompt(tokenizer, prompt))


def _text_tokens(tokenizer: Any, rendered: str) -> list[int]:
    """Token ids of what a chat template made, which writes BOS and its like itself."""
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


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


# From an example to token ids and the positions that are scored: the one place that decides it.
#
# The prompt is encoded as the model gets it before it answers, and the response on its own after it, so that
# a score is P(response | the tokens the model is really shown). Encoding both as one text can merge the end
# of the prompt with the start of the response into a token that never occurs in use; such rows are counted.


LOSS_ON = ("response", "all")


@dataclass(frozen=True)
class Encoded:
    """One example in tokens."""

    ids: list[int]
    """Prompt, response, and the end-of-turn token where it is wanted."""
    n_prompt: int
    """How many of them are the prompt; at least 1."""
    truncated: int = 0
    """How many tokens were cut to fit `max_length`."""
    straddling: bool = False
    """Whether one text of both would be cut into tokens across the boundary."""
    scored_from: int = 0
    """Index of the first token that is scored: `n_prompt`, or 1 when the loss is taken on all tokens."""
    lost_response: int = 0
    """How many of the tokens that were cut belong to the response."""

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.scored_from


@dataclass(frozen=True)
class EncodedSet:
    """A whole test set in tokens, in the order of the file."""

    rows: list[Encoded]
    template: str
    max_length: int

    @property
    def truncated(self) -> int:
        """Rows that lost tokens."""
        return sum(row.truncated > 0 for row in self.rows)

    @property
    def straddling(self) -> int:
        """Rows with a token across the boundary, were both encoded as one text."""
        return sum(row.straddling for row in self.rows)


def encode_example(
    example: Example,
    tokenizer: Any,
    around: Frame,
    *,
    max_length: int | None = None,
    loss_on: str = "response",
) -> Encoded:
    """Encode one example; `around` is what `frame` found in the tokenizer.

    A row longer than `max_length` loses the beginning of its prompt (all but BOS), so that the whole
    response is scored in its nearest context; a response that fills `max_length` alone keeps one prompt
    token and loses its end. Raises `DataError` for a response without tokens.
    """
    prompt = prompt_tokens(tokenizer, example.prompt, around)
    response = response_tokens(tokenizer, example.response, around)
    if not prompt or not response:
        raise DataError(
            f"the {'response' if prompt else 'prompt'} has no tokens", where=f"example {example.id!r}"
        )
    straddling = _straddles(tokenizer, example, prompt, around)
    if around.last is not None:
        response = [*response, around.last]
    kept_prompt, kept_response = _fit(prompt, response, max_length, len(around.first))
    return Encoded(
        ids=[*kept_prompt, *kept_response],
        n_prompt=len(kept_prompt),
        truncated=len(prompt) + len(response) - len(kept_prompt) - len(kept_response),
        straddling=straddling,
        scored_from=1 if loss_on == "all" else len(kept_prompt),
        lost_response=len(response) - len(kept_response),
    )


def _fit(
    prompt: list[int], response: list[int], max_length: int | None, n_first: int
) -> tuple[list[int], list[int]]:
    if max_length is None or len(prompt) + len(response) <= max_length:
        return prompt, response
    response = response[: max_length - 1]
    room = max_length - len(response)
    head = prompt[: min(n_first, room - 1)]
    return [*head, *prompt[len(prompt) - (room - len(head)) :]], response


def _straddles(tokenizer: Any, example: Example, prompt: list[int], around: Frame) -> bool:
    if around.template == "plain":
        text, known = example.prompt, prompt
        if tuple(prompt[:1]) == around.first and around.first:
            known = prompt[1:]
    else:
        text, known = render_prompt(tokenizer, example.prompt), prompt
    joined = tokenizer(text + example.response, add_special_tokens=False)["input_ids"]
    return bool(joined[: len(known)] != known)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    template: str = "auto",
    end_of_turn: bool = True,
    max_length: int,
    loss_on: str = "response",
    strict: bool = False,
) -> EncodedSet:
    """Encode a test set. Under `strict`, a row longer than `max_length` tokens is a `DataError`."""
    if loss_on not in LOSS_ON:
        raise UsageError(f"the loss cannot be taken on {loss_on!r}", expected=" | ".join(LOSS_ON))
    if max_length < 2:
        raise UsageError(f"a length of {max_length} tokens leaves nothing to score", expected="at least 2")
    around = frame(tokenizer, template, end_of_turn=end_of_turn)
    rows = []
    for example in examples:
        row = encode_example(example, tokenizer, around, max_length=max_length, loss_on=loss_on)
        if row.truncated and strict:
            raise DataError(
                f"the row has {len(row.ids) + row.truncated:,} tokens",
                where=f"example {example.id!r}",
                expected=f"at most {max_length:,} tokens",
                remedy="remove the row, or give --no-strict to cut its prompt at the beginning",
            )
        rows.append(row)
    return EncodedSet(rows, around.template, max_length)


def encoding_findings(encoded: EncodedSet, names: Sequence[str], context: int | None = None) -> list[Finding]:
    """Rows that were cut, and rows of which one text of both parts would be cut into tokens otherwise.

    `context` is the longest row that the model was made for.
    """
    findings = []
    if encoded.truncated:
        first = next(name for name, row in zip(names, encoded.rows, strict=True) if row.truncated)
        longer = context is None or encoded.max_length < context
        findings.append(
            Finding(
                severity="warning",
                code="truncated",
                message=f"{encoded.truncated} of {len(names)} rows were cut to {encoded.max_length:,} "
                f"tokens, the first of them {first!r}; {_lost_responses(encoded.rows)}",
                remedy=("raise --max-length" if longer else "shorten them, the model was made for no more")
                + ", or leave out --no-strict to refuse such rows",
            )
        )
    if encoded.straddling:
        findings.append(
            Finding(
                severity="note",
                code="straddling",
                message=f"in {encoded.straddling} of {len(names)} rows a tokenizer that saw prompt and "
                "response as one text would join them; they are scored apart, as in generation",
            )
        )
    return findings


def _lost_responses(rows: Sequence[Encoded]) -> str:
    """Which part the cut took."""
    lost = sum(row.lost_response > 0 for row in rows)
    return f"{lost} of them lost the end of the response" if lost else "their prompts lost the beginning"


# Conversations as token ids: any number of turns, a system prompt where one is wanted.


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
        rendered = chat_template.render(tokenizer, messages, start_answer=True)
    except chat_template.TemplateRefusal as error:
        raise DataError(
            f"the chat template refuses these messages: {str(error).strip()}",
            where=getattr(tokenizer, "name_or_path", None),
            remedy="bring the roles into the order that the template wants, or leave out the system prompt",
        ) from error
    return _text_tokens(tokenizer, rendered)


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
