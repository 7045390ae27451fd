"""One text through a model step by step: what is already in the cache is not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from lorasmith.errors import UsageError
from lorasmith.models.decoding import last_positions_only, takes_positions
from lorasmith.models.load import LoadedModel
from lorasmith.models.slots import serves


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
