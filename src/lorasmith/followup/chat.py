"""Talking to a model: answers as they come, with history; or base, adapter and merged side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import StrPath
from lorasmith.followup.responses.engines import DTYPES, generation_route, resolve_dtype
from lorasmith.followup.speculation.loop import ModelDrafter, rounds
from lorasmith.followup.speculation.speculate import require_same_tokenizer
from lorasmith.models.chat_template import Message
from lorasmith.models.device import Route, resolve_device, use_route
from lorasmith.models.generation.continuous import Stepper
from lorasmith.models.generation.decoding import Sampling, choose, stream
from lorasmith.models.generation.generate import stop_tokens
from lorasmith.models.load import LoadedModel, load_model
from lorasmith.models.text import conversation_tokens, frame, require_chat, resolve_template
from lorasmith.options import ChatOptions

DRAFT_TOKENS = 4


class Chat:
    """One conversation with one model."""

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        options: ChatOptions,
        route: Route,
        *,
        draft: LoadedModel | None = None,
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`within` is entered around every answer, such as PEFT's `disable_adapter` for the base model."""
        if options.template != "plain":
            require_chat(loaded.tokenizer, "chat")
        if draft is not None:
            if options.temperature:
                raise UsageError(
                    "a draft model is used with greedy decoding only", remedy="leave out --temperature"
                )
            require_same_tokenizer(loaded.tokenizer, draft.tokenizer, Path(draft.tokenizer.name_or_path))
        self.name, self.loaded, self.options = name, loaded, options
        self.messages: list[Message] = []
        self._route, self._within, self._draft = route, within, draft
        self._around = frame(
            loaded.tokenizer, resolve_template(loaded.tokenizer, options.template), end_of_turn=False
        )
        self._stop = frozenset(stop_tokens(loaded, self._around.template))
        self._stepper = Stepper(loaded)
        self._random = stream(options.seed)
        self.tokens: list[int] = []
        """Tokens of the newest answer."""

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def answer(self, text: str) -> Iterator[str]:
        """The answer in pieces as they come; question and answer then belong to the conversation.

        What was said before an interruption belongs to it too. Raises `DataError` when the conversation no
        longer fits into the model's context.
        """
        if self._around.template == "plain":
            self.messages.clear()
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = conversation_tokens(self.loaded.tokenizer, [*self._system(), *asked], self._around)
        room = (self.loaded.context or 1 << 62) - len(ids)
        if room < 1:
            raise DataError(
                f"the conversation has {len(ids):,} tokens and the model room for {self.loaded.context:,}",
                remedy="type /reset to begin anew",
            )
        self.tokens, shown = [], ""
        try:
            with use_route(self._route), self._within():
                for token in self._generate(ids, min(room, self.options.max_new_tokens)):
                    self.tokens.append(token)
                    whole = self._decode()
                    if not whole.endswith("\ufffd"):  # half of a character: its rest is still to come
                        yield whole[len(shown) :]
                        shown = whole
            yield self._decode()[len(shown) :]
        finally:
            self.messages = [*asked, {"role": "assistant", "content": self._decode()}]

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.options.system}] if self.options.system else []

    def _decode(self) -> str:
        return str(self.loaded.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _generate(self, ids: list[int], limit: int) -> Iterator[int]:
        if self._draft is not None:
            drafter = ModelDrafter(self._draft)
            for new, *_ in rounds(self.loaded, drafter, ids, DRAFT_TOKENS, limit, self._stop):
                yield from (token for token in new if token not in self._stop)
            return
        text = list(ids)
        for _ in range(limit):
            token = int(
                choose(
                    self._stepper.logits(text), Sampling.of(self.options, self.options.seed), [self._random]
                )[0]
            )
            if token in self._stop:
                return
            yield token
            text.append(token)


def open_chat(
    model: StrPath,
    *,
    adapter: StrPath | None = None,
    draft: StrPath | None = None,
    options: ChatOptions | None = None,
) -> Chat:
    """A conversation with a model, an adapter on top of it where one is given, a draft for speed."""
    options = options or ChatOptions()
    load, route = _loader(Path(model), options)
    loaded = load(Path(model), None if adapter is None else Path(adapter))
    small = None if draft is None else load(Path(draft), None)
    return Chat("adapter" if adapter else "model", loaded, options, route, draft=small)


def open_side_by_side(
    model: StrPath, adapter: StrPath, merged: StrPath | None = None, *, options: ChatOptions | None = None
) -> list[Chat]:
    """Conversations with the adapter (first: the reference), the base, and the merged model where given."""
    options = options or ChatOptions()
    load, route = _loader(Path(model), options)
    both = load(Path(model), Path(adapter))
    chats = [
        Chat("adapter", both, options, route),
        Chat("base", both, options, route, within=both.model.disable_adapter),
    ]
    if merged is not None:
        chats.append(Chat("merged", load(Path(merged), None), options, route))
    return chats


def _loader(model: Path, options: ChatOptions) -> tuple[Callable[[Path, Path | None], LoadedModel], Route]:
    device = resolve_device(options.device)
    dtype = resolve_dtype(model, options.dtype, device.type)

    def load(folder: Path, adapter: Path | None) -> LoadedModel:
        return load_model(folder, adapter=adapter, device=device, dtype=DTYPES[dtype])

    return load, generation_route(dtype, device)


@dataclass(frozen=True)
class AnswerStretch:
    """A stretch of an answer."""

    text: str
    differs: bool
    """Whether its tokens are not those of the reference."""


def mark_differences(reference: Chat, other: Chat) -> list[AnswerStretch]:
    """The newest answer of `other` in stretches of tokens that are and are not in the reference's answer."""
    return mark_tokens(
        reference.tokens,
        other.tokens,
        lambda tokens: str(other.loaded.tokenizer.decode(tokens, skip_special_tokens=True)),
    )


def mark_tokens(
    reference: Sequence[int], tokens: Sequence[int], decode: Callable[[list[int]], str]
) -> list[AnswerStretch]:
    """Token ids aligned with those of a reference; text is cut where the decoded beginnings end.

    An answer that ends earlier than the reference differs at its end in nothing that could be marked: then
    an empty piece that differs stands last.
    """
    pieces: list[AnswerStretch] = []
    done = ""
    matcher = SequenceMatcher(None, list(reference), list(tokens), autojunk=False)
    for kind, _, _, _, end in matcher.get_opcodes():
        whole = decode(list(tokens[:end]))
        if kind == "delete" and end < len(tokens):
            continue
        pieces.append(AnswerStretch(whole[len(done) :], kind != "equal"))
        done = whole
    return pieces
