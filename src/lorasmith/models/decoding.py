"""What every way of decoding needs: prompts padded on the left, positions, the head on the last few alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both [B, T] int64: padded on the left, so that the newest tokens are last."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[place, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def takes_positions(model: Any) -> bool:
    """Whether its forward is told positions; else they come from the mask (ALiBi), or there are none."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(inner.forward).parameters


def positions(model: Any, mask: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
    """`position_ids` [B, width] of the newest tokens, counted from each row's first real token.

    Nothing for a model without the argument. `mask` [B, T] covers all tokens so far.
    """
    if not takes_positions(model):
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]}


@contextmanager
def last_positions_only(model: Any, count: int = 1) -> Iterator[None]:
    """Apply the head to the last `count` positions: a prompt's full logits would not fit in memory."""
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0][:, -count:], *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()
