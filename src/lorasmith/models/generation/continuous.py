"""Continuous batching: a finished row makes room at once, so that no step is spent on rows that have ended.

Sorting by prompt length cannot know how long the answers get; a padded batch computes for its longest answer.
Here a row that ends leaves its slot and the next prompt takes it. Models with recurrent states, whose cache
has no columns, are generated one row at a time.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from lorasmith.errors import UsageError
from lorasmith.models.device import is_out_of_memory, release_memory
from lorasmith.models.generation.decoding import (
    GeneratedAnswer,
    GenerationLimits,
    Request,
    Sampling,
    choose,
    last_positions_only,
    left_padded,
    positions,
    stream,
    takes_positions,
)
from lorasmith.models.load import LoadedModel

# A key-value cache whose rows come and go: a finished row leaves its slot, a new one takes it at once.
#
# All rows end at the same column, so each step writes one column in place, and each row lies in the columns
# just before it; what stands further left in its slot is old and masked. Shapes: N rows, H heads, C columns,
# D head width.


_SPARE = 128
"""Columns to begin with beyond what is needed; afterwards the room grows by half, as lists do."""


class Window:
    """Which part of the slots is in use, for all layers alike."""

    def __init__(self) -> None:
        self.rows = 0
        self.first = 0
        """First column that some row still needs."""
        self.end = 0
        """Column that the next token is written to."""
        self.capacity = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values of one attention layer, both `[slots, H, capacity, D]`."""

    is_sliding = False

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Slots are made when the first row joins."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new columns in place; returns the part in use as a view, `[N, H, width, D]`."""
        assert self.keys is not None and self.values is not None
        window, width = self.window, key_states.shape[-2]
        until = window.end + width
        self.keys[: window.rows, :, window.end : until] = key_states
        self.values[: window.rows, :, window.end : until] = value_states
        part = (slice(window.rows), slice(None), slice(window.first, until))
        return self.keys[part], self.values[part]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width of the keys after the next update, and the column where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.window.end - self.window.first

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def resize(self, slots: int, like: tuple[torch.Tensor, torch.Tensor], capacity: int, end: int) -> None:
        """Move the window so that it ends at `end`, into new tensors where the present ones are too small."""
        window = self.window
        width = window.end - window.first
        present: tuple[torch.Tensor | None, torch.Tensor | None] = (self.keys, self.values)
        moved = []
        for old, new in zip(present, like, strict=True):
            heads, size = new.shape[1], new.shape[-1]
            if old is None or old.shape[0] < slots or old.shape[2] != capacity:
                made = torch.zeros(slots, heads, capacity, size, dtype=new.dtype, device=new.device)
            else:
                made = old
            if old is not None and width and (made is not old or end != window.end):
                kept = old[: window.rows, :, window.first : window.end]
                made[: window.rows, :, end - width : end] = kept.clone() if made is old else kept
            moved.append(made)
        self.keys, self.values = moved
        self.is_initialized = True


def serves(model: Any) -> bool:
    """Whether every layer of the model keeps plain keys and values; recurrent states have no columns."""
    layers = DynamicCache(config=model.config).layers
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    return all(type(layer) in plain for layer in layers)


class Slots:
    """The rows that are being generated, and their part of the cache."""

    def __init__(self) -> None:
        self.window = Window()
        self.lengths: list[int] = []
        """Tokens of each row that are in the cache."""
        self.cache: Cache | None = None

    def join(self, filled: DynamicCache, lengths: list[int]) -> None:
        """Take over rows from a cache of left-padded prompts; they become the last rows."""
        window = self.window
        if self.cache is None:
            self.cache = Cache(layers=[SlotLayer(window) for _ in filled.layers])
        self._make_room(filled, lengths)
        place = window.rows
        for mine, theirs in zip(self.cache.layers, filled.layers, strict=True):
            if not theirs.is_initialized:
                continue  # a layer that shares another's keys
            for offset, length in enumerate(lengths):
                columns = slice(window.end - length, window.end)
                mine.keys[place + offset, :, columns] = theirs.keys[offset, :, -length:]
                mine.values[place + offset, :, columns] = theirs.values[offset, :, -length:]
        window.rows += len(lengths)
        self.lengths += lengths
        self._narrow()

    def leave(self, place: int) -> None:
        """Drop a row; the last one takes its slot and its number."""
        window, last = self.window, self.window.rows - 1
        if place != last and self.cache is not None:
            part = slice(window.end - self.lengths[last], window.end)
            for layer in self.cache.layers:
                if layer.is_initialized:
                    layer.keys[place, :, part] = layer.keys[last, :, part]
                    layer.values[place, :, part] = layer.values[last, :, part]
        self.lengths[place] = self.lengths[last]
        self.lengths.pop()
        window.rows = last
        self._narrow()

    def before_step(self) -> None:
        """Make room for one more column."""
        if self.window.end == self.window.capacity:
            self._move(max(self.lengths))

    def after_step(self) -> None:
        """One more token of every row is in the cache."""
        self.window.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def mask(self, device: torch.device) -> torch.Tensor:
        """`[N, width + 1]`: ones over each row's own columns and the coming one."""
        width = self.window.end - self.window.first + 1
        starts = torch.tensor([width - 1 - length for length in self.lengths])
        return (torch.arange(width)[None, :] >= starts[:, None]).long().to(device)

    def positions(self, device: torch.device) -> torch.Tensor:
        """`[N, 1]`: the place of the coming token in each row."""
        return torch.tensor(self.lengths, device=device)[:, None]

    def _narrow(self) -> None:
        self.window.first = self.window.end - max(self.lengths, default=0)

    def _make_room(self, filled: DynamicCache, lengths: list[int]) -> None:
        window, needed = self.window, max([*lengths, *self.lengths])
        slots = window.rows + len(lengths)
        have = max((layer.keys.shape[0] for layer in self._initialized()), default=0)
        if slots > have or needed > window.end or window.end == window.capacity:
            self._move(needed, max(slots, have), filled)

    def _move(self, needed: int, slots: int = 0, filled: DynamicCache | None = None) -> None:
        """Put the window at the left edge, `needed` columns wide, with room to go on."""
        window = self.window
        capacity = window.capacity
        if needed + _SPARE // 2 > capacity:
            capacity = max(needed + _SPARE, needed * 3 // 2)
        assert self.cache is not None
        for number, layer in enumerate(self.cache.layers):
            source: Any = layer if filled is None else filled.layers[number]
            if source.is_initialized:
                layer.resize(slots or source.keys.shape[0], (source.keys, source.values), capacity, needed)
        window.first += needed - window.end
        window.end, window.capacity = needed, capacity

    def _initialized(self) -> list[Any]:
        return [layer for layer in self.cache.layers if layer.is_initialized] if self.cache else []


JOIN_TOKENS = 2048
"""Padded prompt tokens that join in one forward pass: more would need memory that generation does not."""


class _Row:
    """A row that is being generated."""

    def __init__(self, request: Request, room: int, limits: GenerationLimits, sampling: Sampling) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[tuple[list[int], list[float]]] = []
        self.random: np.random.Generator | None = None if sampling.greedy else stream(request.seed)
        self.limit = min(limits.max_new_tokens, room)
        self.reason = "context" if room < limits.max_new_tokens else "length"

    def answer(self, finish: str, end: int | None = None) -> GeneratedAnswer:
        return GeneratedAnswer(self.request.index, self.tokens, finish, end, self.logprobs, self.top)


def generate_continuously(
    loaded: LoadedModel,
    requests: Iterable[Request],
    limits: GenerationLimits,
    *,
    sampling: Sampling | None = None,
    slots: int = 16,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[GeneratedAnswer]:
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
                yield GeneratedAnswer(request.index, [], "failed", error=refused)
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

    def __init__(self, loaded: LoadedModel, limits: GenerationLimits, sampling: Sampling, slots: int) -> None:
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

    def advance(self, on_tokens: Callable[[int], None]) -> Iterator[GeneratedAnswer]:
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

    def _join(self, group: list[Request]) -> list[GeneratedAnswer]:
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

    def _step(self) -> list[GeneratedAnswer]:
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

    def _choose(self, logits: torch.Tensor, first: int) -> list[GeneratedAnswer]:
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

    def _shrink(self, joining: list[Request], reason: str) -> Iterator[GeneratedAnswer]:
        """After a lack of memory: fewer rows at once; one that does not fit even alone has failed."""
        if not joining:
            # Half of the rows give way, the newest ones: they lose the least.
            keep = len(self.rows) // 2
            while len(self.rows) > max(keep, 1 if len(self.rows) > 1 else 0):
                youngest = min(range(len(self.rows)), key=lambda place: len(self.rows[place].tokens))
                request = self.rows[youngest].request
                self._leave(youngest)
                if keep == 0:
                    yield GeneratedAnswer(request.index, [], "failed", error=f"too little memory: {reason}")
                else:
                    self.queue.insert(0, request)
            self.slots = len(self.rows) or self.asked  # one row too large says nothing of the others
        elif self.rows:
            self.slots = len(self.rows)
        elif len(joining) > 1:
            self.slots = max(1, len(joining) // 2)
        else:
            self.slots = self.asked
            yield GeneratedAnswer(self.queue.pop(0).index, [], "failed", error=f"too little memory: {reason}")


# One text through a model step by step: what is already in the cache is not computed again.


class Stepper:
    """A model with the cache of one text, which may be taken back to any earlier point."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Raises `UsageError` for a model with recurrent states: those cannot be taken back."""
        if not serves(loaded.model):
            raise UsageError(
                f"{loaded.architecture} keeps recurrent states, which cannot be taken back",
                expected="a model whose layers all keep keys and values",
            )
        self.loaded = loaded
        self._positioned = takes_positions(loaded.model)
        self.forget()

    def forget(self) -> None:
        """Begin with an empty cache."""
        self._cache: Any = DynamicCache()
        self._seen: list[int] = []

    def logits(self, text: Sequence[int], last: int = 1) -> torch.Tensor:
        """Float logits after each of the `last` tokens at the end of `text`, `[last, V]`."""
        kept = min(_common(self._seen, text), len(text) - last)
        if kept < len(self._seen):
            self._cache.crop(kept - len(self._seen))
        new = torch.tensor([list(text[kept:])], device=self.loaded.device)
        place = torch.arange(kept, len(text), device=self.loaded.device)[None]
        given = {"position_ids": place} if self._positioned else {}
        with last_positions_only(self.loaded.model, last):
            output = self.loaded.model(
                input_ids=new,
                attention_mask=torch.ones(1, len(text), dtype=torch.int64, device=self.loaded.device),
                past_key_values=self._cache,
                use_cache=True,
                **given,
            )
        self._seen = list(text)
        return output.logits[0].float()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))
