"""What generation is asked for, and what it gives back, whichever engine does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """A prompt to be answered."""

    index: int
    """The caller's number for it."""
    tokens: Sequence[int]
    seed: int = 0
    """Of its random numbers."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt."""

    index: int
    tokens: list[int]
    """Without the token that ended it."""
    finish: str
    """`stop`, `length` (the limit of new tokens), `context` (the model's own limit) or `failed`."""
    end: int | None = None
    """The token that ended it, where one did."""
    logprobs: list[float] = field(default_factory=list)
    """Of each chosen token, the end token included, under the model's own distribution; nats."""
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)
    """At each of those places the likeliest tokens and their log-probabilities."""
    error: str = ""


@dataclass(frozen=True)
class Limits:
    """What ends an answer."""

    max_new_tokens: int
    stop: frozenset[int]
    top_logprobs: int = 0
    """How many of the likeliest tokens to keep at each place; 0 for none, then `logprobs` stays empty too."""
