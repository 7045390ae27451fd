"""A key-value cache whose rows come and go: a finished row leaves its slot, a new one takes it at once.

All rows end at the same column, so each step writes one column in place, and each row lies in the columns
just before it; what stands further left in its slot is old and masked. Shapes: N rows, H heads, C columns,
D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

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
