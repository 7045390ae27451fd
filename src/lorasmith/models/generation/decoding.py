"""What every way of decoding needs: prompts padded on the left, positions, the head on the last few alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lorasmith.options import SamplingOptions


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


# What generation is asked for, and what it gives back, whichever engine does it.


@dataclass(frozen=True)
class Request:
    """A prompt to be answered."""

    index: int
    """The caller's number for it."""
    tokens: Sequence[int]
    seed: int = 0
    """Seed of the random numbers of this request."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """What a model wrote after one prompt."""

    index: int
    tokens: list[int]
    """Without the token that ended it."""
    finish: str
    """`stop`, `length` (the limit of new tokens), `context` (the model's own limit) or `failed`."""
    end: int | None = None
    """The token that ended it, where one did."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability (nats) of each chosen token and of the end token, by the model's own distribution."""
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    """At each of those places the likeliest tokens and their log-probabilities."""
    error: str = ""


@dataclass(frozen=True)
class GenerationLimits:
    """What ends an answer."""

    max_new_tokens: int
    stop: frozenset[int]
    top_logprobs: int = 0
    """How many of the likeliest tokens to keep at each place; 0 for none, then `logprobs` stays empty too."""


# Choosing the next token: the likeliest, or one drawn such that a row's neighbours do not matter.
#
# Each row has a random stream of its own, fixed by its seed: one uniform number a token, looked up in the
# cumulative distribution. Temperature, then top-k, then top-p, in the order of Holtzman et al. 2020
# (arXiv:1904.09751) as generation libraries apply them.


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; a temperature of 0 takes the likeliest (greedy)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 for no limit."""
    seed: int = 0
    """Seed of everything random; greedy decoding does not use it."""

    @classmethod
    def of(cls, options: SamplingOptions, seed: int) -> Sampling:
        """What was asked for."""
        return cls(options.temperature, options.top_p, options.top_k, seed)

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0


def stream(seed: int) -> np.random.Generator:
    """The random numbers of one row."""
    return np.random.Generator(np.random.Philox(key=seed))


def choose(
    logits: torch.Tensor, sampling: Sampling, streams: Sequence[np.random.Generator | None]
) -> torch.Tensor:
    """The next token of each row, `[N]`, from float logits `[N, V]`; `streams` are those of the rows."""
    if sampling.greedy:
        return logits.argmax(-1)
    draws = torch.tensor([row.random() for row in streams if row is not None], dtype=torch.float64)
    ordered, tokens = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered, tokens = ordered[:, : sampling.top_k], tokens[:, : sampling.top_k]
    chances = ordered.softmax(-1)
    before = chances.cumsum(-1) - chances
    chances = chances * (before < sampling.top_p)  # the likeliest always stays: nothing stands before it
    reached = chances.cumsum(-1)
    place = torch.searchsorted(reached, (draws.to(reached.device) * reached[:, -1])[:, None], right=True)
    return tokens.gather(-1, place.clamp(max=tokens.shape[-1] - 1))[:, 0]
