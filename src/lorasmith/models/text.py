"""How a prompt is put to the model, and which token ends its answer: read off the tokenizer, not guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lorasmith.errors import CheckpointError, DataError, UsageError
from lorasmith.models import chat_template
from lorasmith.models.chat_template import Message
from lorasmith.models.conversation import Answer, Script, Wording, turns_of, write_script
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
# Two boundaries between what is given and what is scored. *generation*: the prompt is encoded as the model
# gets it before it answers, and the response on its own after it, so that a score is P(response | the tokens
# the model is really shown). *text*: both are encoded as one text, as trainers and lm-eval do; that can merge
# the end of the prompt with the start of the response into a token that never occurs in use. Rows where the
# two give other tokens are counted under either.


LOSS_ON = ("response", "assistant", "last", "all")
BOUNDARIES = ("generation", "text")

Span = tuple[int, int]
"""From the index of a first token to that behind a last one."""


@dataclass(frozen=True)
class Encoded:
    """One example in tokens."""

    ids: list[int]
    """All that the model sees, the end-of-turn token where it is wanted."""
    n_prompt: int
    """How many of them stand before the last answer; at least 1."""
    spans: tuple[Span, ...] = ()
    """The tokens that are scored, in their order; the first token of a row never is."""
    turns: tuple[int, ...] = ()
    """Numbers of the assistant's turns that the spans are, from 1; empty where the row is no conversation."""
    truncated: int = 0
    """How many tokens were cut to fit `max_length`."""
    straddling: bool = False
    """Whether the other boundary would give other tokens."""
    lost_response: int = 0
    """How many of the tokens that were cut would have been scored."""
    rewritten: bool = False
    """Whether the template writes earlier turns otherwise once others follow."""

    @classmethod
    def behind(cls, ids: list[int], start: int) -> Encoded:
        """A row whose tokens from index `start` on are scored."""
        return cls(ids, start, spans=((start, len(ids)),))

    @cached_property
    def scored_at(self) -> list[int]:
        """Index of each token that is scored."""
        return [place for start, stop in self.spans for place in range(start, stop)]

    @property
    def targets(self) -> list[int]:
        """The tokens that are scored."""
        return [self.ids[place] for place in self.scored_at]

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True)
class EncodedSet:
    """A whole test set in tokens, in the order of the file."""

    rows: list[Encoded]
    template: str
    max_length: int
    boundary: str = "generation"

    @property
    def truncated(self) -> int:
        """Rows that lost tokens."""
        return sum(row.truncated > 0 for row in self.rows)

    @property
    def straddling(self) -> int:
        """Rows to which the other boundary gives other tokens."""
        return sum(row.straddling for row in self.rows)


@dataclass(frozen=True)
class Manner:
    """How rows become tokens, and which of these are scored."""

    around: Frame
    loss_on: str = "response"
    boundary: str = "generation"
    wording: Wording = field(default_factory=Wording)


def encode_example(
    example: Example, tokenizer: Any, manner: Manner, *, max_length: int | None = None
) -> Encoded:
    """Encode one example.

    A row longer than `max_length` loses the beginning of its prompt (all but BOS), so that the whole
    response is scored in its nearest context; a response that fills `max_length` alone keeps one prompt
    token and loses its end. Raises `DataError` for a response without tokens, for conversations without a
    chat template, and for what the template cannot lay out.
    """
    if example.is_text:
        row = _encode_text(example, tokenizer, manner)
    elif manner.around.template == "chat" and (
        example.messages or manner.boundary == "text" or manner.wording != Wording()
    ):
        row = _encode_script(example, tokenizer, manner)
    else:
        row = _encode_pair(example, tokenizer, manner)
    return fit(row, max_length, len(manner.around.first))


def _encode_pair(example: Example, tokenizer: Any, manner: Manner) -> Encoded:
    """A prompt and its response: under `plain` one text, under `chat` two messages."""
    around = manner.around
    if example.messages or manner.wording.system is not None:
        raise DataError(
            "a conversation, or a system prompt, needs a chat template",
            where=f"example {example.id!r}",
            expected="rows of one prompt and one response, or a model with a chat template",
            remedy="give one by --chat-template FILE, or leave --template plain and --system out",
        )
    prompt = prompt_tokens(tokenizer, example.prompt, around)
    response = response_tokens(tokenizer, example.response, around)
    if not prompt or not response:
        raise DataError(
            f"the {'response' if prompt else 'prompt'} has no tokens", where=f"example {example.id!r}"
        )
    joined = _joined(tokenizer, example, prompt, around)
    straddling = joined[: len(prompt)] != prompt
    ids = joined if manner.boundary == "text" else [*prompt, *response]
    if around.last is not None:
        ids = [*ids, around.last]
    shared = _shared(prompt, ids) if manner.boundary == "text" else len(prompt)
    start = max(1, min(shared, len(ids) - 1))
    return Encoded(
        ids, start, spans=((1 if manner.loss_on == "all" else start, len(ids)),), straddling=straddling
    )


def _joined(tokenizer: Any, example: Example, prompt: list[int], around: Frame) -> list[int]:
    """Prompt and response as one text, behind what stands before it."""
    text = example.prompt if around.template == "plain" else render_prompt(tokenizer, example.prompt)
    ids = tokenizer(text + example.response, add_special_tokens=False)["input_ids"]
    begins = (
        around.template == "plain" and tuple(prompt[:1]) == around.first and tuple(ids[:1]) != around.first
    )
    return [*around.first, *ids] if begins else list(ids)


def _encode_text(example: Example, tokenizer: Any, manner: Manner) -> Encoded:
    """Raw text: all of it is scored but its first token."""
    ids = list(tokenizer(example.response)["input_ids"])
    end = tokenizer.eos_token_id
    if manner.around.last is not None and end is not None and ids[-1:] != [end]:
        ids.append(int(end))
    if len(ids) < 2:
        raise DataError("the text has fewer than two tokens", where=f"example {example.id!r}")
    return Encoded(ids, 1, spans=((1, len(ids)),))


def _encode_script(example: Example, tokenizer: Any, manner: Manner) -> Encoded:
    """A conversation, as the chat template writes it."""
    last_only = manner.loss_on != "assistant"
    script = write_script(tokenizer, example, manner.wording, last_only=last_only)
    trained = _trained(example, script.answers, manner)
    if not trained:
        raise DataError(
            "every answer of the row is marked as not to be learnt",
            where=f"example {example.id!r}",
            expected="an answer with weight 1, or without a weight",
            remedy="remove the row, or give --loss-on last",
        )
    cut = _apart if manner.boundary == "generation" else _together
    ids, spans, straddling = cut(tokenizer, script, manner)
    if manner.loss_on == "all":
        kept, numbers = [(1, len(ids))], []
    else:
        kept = [spans[place] for place in trained]
        numbers = [script.answers[place].number for place in trained] if len(example.turns) > 2 else []
    if not all(start < stop for start, stop in kept):
        raise DataError("an answer has no tokens", where=f"example {example.id!r}")
    return Encoded(
        ids,
        spans[-1][0],
        spans=tuple(kept),
        turns=tuple(numbers),
        straddling=straddling,
        rewritten=script.found_by == "contents",
    )


def _trained(example: Example, answers: Sequence[Answer], manner: Manner) -> list[int]:
    """Which of the answers are scored: the row's own flags count where all answers are."""
    if manner.loss_on != "assistant":
        return [len(answers) - 1]
    flags = [turn.train for turn in example.turns if turn.role == "assistant"]
    return [place for place, answer in enumerate(answers) if flags[answer.number - 1] is not False]


def _apart(tokenizer: Any, script: Script, manner: Manner) -> tuple[list[int], list[Span], bool]:
    """Tokens as they come about in use: what is given and what is answered are encoded each on its own."""
    ids: list[int] = []
    spans: list[Span] = []
    at = 0
    for answer in script.answers:
        ids += _text_tokens(tokenizer, script.text[at : answer.start])
        own = _text_tokens(tokenizer, script.text[answer.start : answer.stop])
        spans.append((len(ids), len(ids) + len(own)))
        ids += own
        at = answer.stop
    # What follows the last answer comes from nobody who writes: the template alone puts it there.
    straddling = ids != _text_tokens(tokenizer, script.text[:at])
    if manner.around.last is None:
        spans = [_without_end(tokenizer, ids, span) for span in spans]
        ids = ids[: spans[-1][1]]
    return ids, spans, straddling


def _together(tokenizer: Any, script: Script, manner: Manner) -> tuple[list[int], list[Span], bool]:
    """Tokens of the whole text, as trainers encode it; the last answer goes to its end as theirs does.

    Where a prompt alone would have other tokens than it has in the whole text, the answer begins at the first
    of these, as in TRL 1.16; lm-eval and older trainers begin behind as many tokens as the prompt alone has.
    What a template marks is taken to the letter, as transformers makes its masks.
    """
    whole = tokenizer(script.text, add_special_tokens=False)
    ids = list(whole["input_ids"])
    spans: list[Span] = []
    straddling = False
    last_only = manner.loss_on != "assistant"
    marked = script.marked if whole.is_fast and not last_only else ()
    for start, stop in marked:
        first, last = whole.char_to_token(start), whole.char_to_token(stop - 1)
        spans.append((len(ids) if first is None else first, len(ids) if last is None else last + 1))
    for answer in script.answers:
        before = _text_tokens(tokenizer, script.asked if last_only else script.text[: answer.start])
        straddling |= ids[: len(before)] != before
        if not marked:
            after = _text_tokens(tokenizer, script.text[: answer.stop])
            spans.append((_shared(before, ids), min(len(after), len(ids))))
    if manner.around.last is None:
        spans = [_without_end(tokenizer, ids, span) for span in spans]
        ids = ids[: spans[-1][1]]
    elif last_only:
        spans[-1] = (spans[-1][0], len(ids))
    return ids, spans, straddling


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _without_end(tokenizer: Any, ids: Sequence[int], span: Span) -> Span:
    """A span without the special tokens that end it."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    start, stop = span
    while stop > start and ids[stop - 1] in special:
        stop -= 1
    return start, stop


def fit(row: Encoded, max_length: int | None, n_first: int) -> Encoded:
    """A row cut to `max_length` tokens: the beginning first, of which `n_first` tokens stay."""
    if max_length is None or len(row.ids) <= max_length:
        return row
    # An answer that fills the room alone keeps one token before it and loses its end.
    end = min(len(row.ids), row.n_prompt + max_length - 1)
    gone = end - max_length
    head = min(n_first, max_length - (end - row.n_prompt) - 1)

    def moved(place: int) -> int:
        return place if place <= head else max(head, min(place, end) - gone)

    pairs = [(max(1, moved(start)), moved(stop)) for start, stop in row.spans]
    kept = [place for place, (start, stop) in enumerate(pairs) if start < stop]
    spans = tuple(pairs[place] for place in kept)
    return replace(
        row,
        ids=[*row.ids[:head], *row.ids[head + gone : end]],
        n_prompt=row.n_prompt - gone,
        spans=spans,
        turns=tuple(row.turns[place] for place in kept) if row.turns else (),
        truncated=len(row.ids) - max_length,
        lost_response=row.scored - sum(stop - start for start, stop in spans),
    )


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    template: str = "auto",
    end_of_turn: bool = True,
    max_length: int,
    loss_on: str = "response",
    boundary: str = "generation",
    wording: Wording | None = None,
    strict: bool = False,
) -> EncodedSet:
    """Encode a test set. Under `strict`, a row longer than `max_length` tokens is a `DataError`."""
    if loss_on not in LOSS_ON:
        raise UsageError(f"the loss cannot be taken on {loss_on!r}", expected=" | ".join(LOSS_ON))
    if boundary not in BOUNDARIES:
        raise UsageError(f"there is no boundary {boundary!r}", expected=" | ".join(BOUNDARIES))
    if max_length < 2:
        raise UsageError(f"a length of {max_length} tokens leaves nothing to score", expected="at least 2")
    around = frame(tokenizer, template, end_of_turn=end_of_turn)
    manner = Manner(around, loss_on, boundary, wording or Wording())
    rows = []
    for example in examples:
        row = encode_example(example, tokenizer, manner, max_length=max_length)
        if row.truncated and strict:
            raise DataError(
                f"the row has {len(row.ids) + row.truncated:,} tokens",
                where=f"example {example.id!r}",
                expected=f"at most {max_length:,} tokens",
                remedy="remove the row, or give --no-strict to cut its prompt at the beginning",
            )
        rows.append(row)
    return EncodedSet(rows, around.template, max_length, boundary)


def encoding_findings(encoded: EncodedSet, names: Sequence[str], context: int | None = None) -> list[Finding]:
    """Rows that were cut, rows that the boundary matters to, and rows that the template writes otherwise.

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
                f"response as one text would join them; {_TREATED[encoded.boundary]}",
            )
        )
    rewritten = sum(row.rewritten for row in encoded.rows)
    if rewritten:
        findings.append(
            Finding(
                severity="note",
                code="turns-rewritten",
                message=f"in {rewritten} of {len(names)} rows the chat template writes earlier answers "
                "otherwise than when they were the last (without their reasoning, for example); they are "
                "scored as they stand in the whole conversation",
            )
        )
    return findings


_TREATED = {
    "generation": "they are scored apart, as in generation",
    "text": "they are scored joined, as trainers do (--boundary text)",
}


def _lost_responses(rows: Sequence[Encoded]) -> str:
    """Which part the cut took."""
    lost = sum(row.lost_response > 0 for row in rows)
    return f"{lost} of them lost the end of the response" if lost else "their prompts lost the beginning"


# Conversations as token ids: any number of turns, a system prompt where one is wanted.


def question_tokens(example: Example, tokenizer: Any, around: Frame, wording: Wording) -> list[int]:
    """Token ids of a row that waits for its answer; raises as `conversation_tokens` does."""
    messages = [turn.message() for turn in turns_of(example, wording)]
    return conversation_tokens(tokenizer, messages, around, tools=example.tools, arguments=wording.arguments)


def conversation_tokens(
    tokenizer: Any,
    messages: list[Message],
    around: Frame,
    *,
    tools: Sequence[dict[str, Any]] = (),
    arguments: Mapping[str, Any] | None = None,
) -> list[int]:
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
        rendered = chat_template.render(
            tokenizer, messages, start_answer=True, tools=tools, arguments=arguments
        )
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
