"""Continuous batching: a finished row makes room at once, so that no step is spent on rows that have ended.

Sorting by prompt length cannot know how long the answers get; a padded batch computes for its longest answer.
Here a row that ends leaves its slot and the next prompt takes it. Models with recurrent states, whose cache
has no columns, are generated one row at a time.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from lorasmith.models.decoding import last_positions_only, left_padded, positions, takes_positions
from lorasmith.models.load import LoadedModel
from lorasmith.models.memory import is_out_of_memory, release_memory
from lorasmith.models.requests import Answer, Limits, Request
from lorasmith.models.sampling import Sampling, choose, stream
from lorasmith.models.slots import Slots, serves

JOIN_TOKENS = 2048
"""Padded prompt tokens that join in one forward pass: more would need memory that generation does not."""


class _Row:
    """A row that is being generated."""

    def __init__(self, request: Request, room: int, limits: Limits, sampling: Sampling) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[tuple[list[int], list[float]]] = []
        self.random: np.random.Generator | None = None if sampling.greedy else stream(request.seed)
        self.limit = min(limits.max_new_tokens, room)
        self.reason = "context" if room < limits.max_new_tokens else "length"

    def answer(self, finish: str, end: int | None = None) -> Answer:
        return Answer(self.request.index, self.tokens, finish, end, self.logprobs, self.top)


def generate_continuously(
    loaded: LoadedModel,
    requests: Iterable[Request],
    limits: Limits,
    *,
    sampling: Sampling | None = None,
    slots: int = 16,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[Answer]:
    """Answers in the order in which they end; requests are taken as room comes free.

    A request that cannot be answered (too long for the model, ids outside the vocabulary, too little memory
    even alone) comes back as `failed` with its reason; rows that have to give way are begun again, with the
    same outcome. `on_tokens` hears how many tokens each step gave. Call it inside `use_route`.
    """
    batch = _Batch(loaded, limits, sampling or Sampling(), slots if serves(loaded.model) else 1)
    waiting = iter(requests)
    while True:
        for request in itertools.islice(waiting, batch.free):
            refused = _refuse(request, loaded)
            if refused:
                yield Answer(request.index, [], "failed", error=refused)
            else:
                batch.queue.append(request)
        if batch.queue or batch.rows:
            yield from batch.advance(on_tokens)
        elif (first := next(waiting, None)) is not None:
            waiting = itertools.chain([first], waiting)
        else:
            return


def _refuse(request: Request, loaded: LoadedModel) -> str:
    """Why a request can have no answer, else an empty text."""
    if not request.tokens:
        return "the prompt has no tokens"
    if loaded.context is not None and len(request.tokens) >= loaded.context:
        return f"the prompt has {len(request.tokens):,} tokens and the model room for {loaded.context:,}"
    if max(request.tokens) >= loaded.vocabulary:
        return f"the prompt holds token {max(request.tokens)}, the model has {loaded.vocabulary:,}"
    return ""


class _Batch:
    """The rows under way, their cache, and those that wait for a slot."""

    def __init__(self, loaded: LoadedModel, limits: Limits, sampling: Sampling, slots: int) -> None:
        self.loaded, self.limits, self.sampling, self.slots = loaded, limits, sampling, slots
        self.asked = slots
        self.queue: list[Request] = []
        self.rows: list[_Row] = []
        self.single: Any = None
        """The model's own cache, where rows go one at a time."""
        self.own = not serves(loaded.model)
        self.positioned = takes_positions(loaded.model)
        named = inspect.signature(loaded.model.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in named else "past_key_values"
        self.cache = Slots()
        self.last: list[int] = []
        """The newest token of each row, not yet in the cache."""

    @property
    def free(self) -> int:
        """Slots that nothing is waiting for."""
        return max(0, self.slots - len(self.rows) - len(self.queue))

    def advance(self, on_tokens: Callable[[int], None]) -> Iterator[Answer]:
        """Let waiting rows join, else do one step for all rows; yields what ended."""
        joining = self._next_group()
        try:
            done = self._join(joining) if joining else self._step()
        except Exception as error:  # only the message tells a lack of memory, see models.memory
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
        else:
            on_tokens(len(joining) or len(self.rows) + len(done))
            yield from done
            return
        release_memory()
        yield from self._shrink(joining, reason)

    def _next_group(self) -> list[Request]:
        group: list[Request] = []
        for request in self.queue[: self.slots - len(self.rows)]:
            longest = max(len(row.tokens) for row in [*group, request])
            if group and longest * (len(group) + 1) > JOIN_TOKENS:
                break
            group.append(request)
        return group

    def _join(self, group: list[Request]) -> list[Answer]:
        loaded = self.loaded
        ids, mask = left_padded([request.tokens for request in group], loaded.device)
        filled = DynamicCache(config=loaded.model.config) if self.own else DynamicCache()
        known = positions(loaded.model, mask, ids.shape[1])
        output = self._forward(ids, None if self.own else mask, filled, known)
        if self.own:
            self.single = filled
        else:
            self.cache.join(filled, [len(request.tokens) for request in group])
        del self.queue[: len(group)]
        first = len(self.rows)
        room = loaded.context or (1 << 62)
        self.rows += [
            _Row(request, room - len(request.tokens), self.limits, self.sampling) for request in group
        ]
        self.last += [0] * len(group)
        return self._choose(output, first)

    def _step(self) -> list[Answer]:
        device = self.loaded.device
        ids = torch.tensor(self.last, device=device)[:, None]
        if self.own:
            length = len(self.rows[0].request.tokens) + len(self.rows[0].tokens)
            place = torch.tensor([[length - 1]], device=device)
            known = {"position_ids": place} if self.positioned else {}
            return self._choose(self._forward(ids, None, self.single, known), 0)
        self.cache.before_step()
        known = {"position_ids": self.cache.positions(device)} if self.positioned else {}
        output = self._forward(ids, self.cache.mask(device), self.cache.cache, known)
        self.cache.after_step()
        return self._choose(output, 0)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any, known: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Float logits of the last position, `[N, V]`.

        A row on its own comes without a mask: recurrent layers would take a mask for the width of the step.
        """
        model = self.loaded.model
        with last_positions_only(model):
            given = {"attention_mask": mask, self.cache_name: cache, **known}
            output = model(input_ids=ids, use_cache=True, **given)
        return output.logits[:, -1].float()

    def _choose(self, logits: torch.Tensor, first: int) -> list[Answer]:
        """Give each row from `first` on its next token; rows that end leave."""
        rows = self.rows[first:]
        chosen = choose(logits, self.sampling, [row.random for row in rows])
        if self.limits.top_logprobs:
            self._keep_logprobs(rows, logits, chosen)
        answers = []
        for place, (row, token) in reversed(list(enumerate(zip(rows, chosen.tolist(), strict=True), first))):
            self.last[place] = token
            if token in self.limits.stop:
                answers.append(row.answer("stop", token))
            else:
                row.tokens.append(token)
                if len(row.tokens) < row.limit:
                    continue
                answers.append(row.answer(row.reason))
            self._leave(place)
        return answers[::-1]

    def _keep_logprobs(self, rows: list[_Row], logits: torch.Tensor, chosen: torch.Tensor) -> None:
        every = logits.log_softmax(-1)
        values, tokens = every.topk(min(self.limits.top_logprobs, every.shape[-1]))
        own = every.gather(-1, chosen[:, None])[:, 0].tolist()
        for row, value, best, likely in zip(rows, own, tokens.tolist(), values.tolist(), strict=True):
            row.logprobs.append(value)
            row.top.append((best, likely))

    def _leave(self, place: int) -> None:
        for of_rows in (self.rows, self.last):
            moved: Any = of_rows.pop()
            if place < len(of_rows):
                of_rows[place] = moved
        if self.own:
            self.single = None
        else:
            self.cache.leave(place)

    def _shrink(self, joining: list[Request], reason: str) -> Iterator[Answer]:
        """After a lack of memory: fewer rows at once; one that does not fit even alone has failed."""
        if not joining:
            # Half of the rows give way, the newest ones: they lose the least.
            keep = len(self.rows) // 2
            while len(self.rows) > max(keep, 1 if len(self.rows) > 1 else 0):
                youngest = min(range(len(self.rows)), key=lambda place: len(self.rows[place].tokens))
                request = self.rows[youngest].request
                self._leave(youngest)
                if keep == 0:
                    yield Answer(request.index, [], "failed", error=f"too little memory: {reason}")
                else:
                    self.queue.insert(0, request)
            self.slots = len(self.rows) or self.asked  # one row too large says nothing of the others
        elif self.rows:
            self.slots = len(self.rows)
        elif len(joining) > 1:
            self.slots = max(1, len(joining) // 2)
        else:
            self.slots = self.asked
            yield Answer(self.queue.pop(0).index, [], "failed", error=f"too little memory: {reason}")
