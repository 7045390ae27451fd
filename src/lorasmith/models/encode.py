"""From an example to token ids and the positions that are scored: the one place that decides it.

The prompt is encoded as the model gets it before it answers, and the response on its own after it, so that
a score is P(response | the tokens the model is really shown). Encoding both as one text can merge the end
of the prompt with the start of the response into a token that never occurs in use; such rows are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasmith.errors import DataError, UsageError
from lorasmith.models.template import Frame, frame, prompt_tokens, render_prompt, response_tokens
from lorasmith.records.base import Finding
from lorasmith.records.dataset import Example

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
                remedy="remove the row, or leave out --strict to cut its prompt at the beginning",
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
                + ", or give --strict to refuse such rows",
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
