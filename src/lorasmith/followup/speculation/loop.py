"""Speculative decoding with a constant schedule: a draft proposes, the target checks all of it in one pass.

Greedy acceptance (Leviathan et al. 2023, arXiv:2211.17192, at temperature 0): the longest beginning of the
proposal that is what the target itself finds likeliest, and the target's next token on top. Every round
proposes the same number of tokens, and no threshold of confidence ends a proposal early.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lorasmith.models.generation.continuous import Stepper
from lorasmith.models.load import LoadedModel

LOOKUP_NGRAM = 3
"""Longest end of the text that prompt lookup searches for in what stands before it."""


class Drafter(ABC):
    """Proposes tokens; a subclass is final."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        """Time of each single step, or of each whole proposal where there are no steps."""

    @abstractmethod
    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may come next."""


class ModelDrafter(Drafter):
    """A small model's likeliest tokens."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.stepper = Stepper(loaded)
        self.vocabulary = loaded.vocabulary
        self.context = loaded.context or 1 << 62

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        known = list(text)
        if max(known) >= self.vocabulary or len(known) + count > self.context:
            return []  # a token that only the target's padded embedding has, or no room left
        for _ in range(count):
            began = time.perf_counter()
            known.append(int(self.stepper.logits(known)[0].argmax()))
            self.seconds.append(time.perf_counter() - began)
        return known[len(text) :]


class LookupDrafter(Drafter):
    """Prompt lookup: what followed the last time that the text ended like this. Costs next to nothing."""

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        began = time.perf_counter()
        proposal = _look_up(list(text), count)
        self.seconds.append(time.perf_counter() - began)
        return proposal


def _look_up(text: list[int], count: int) -> list[int]:
    # A longer match is the better guess, and of equal ones the latest.
    for size in range(min(LOOKUP_NGRAM, len(text) - 1), 0, -1):
        end = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == end:
                return text[start + size : start + size + count]
    return []


@dataclass
class Greedy:
    """The target's own greedy answer, one token at a time."""

    tokens: list[int]
    """The end token included, where one came."""
    best: list[tuple[int, int, float, float]] = field(default_factory=list)
    """At each place the two likeliest tokens and their logits."""
    step_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Speculated:
    """The same answer by drafts, with the account of every round."""

    tokens: list[int]
    rounds: int = 0
    drafted: int = 0
    reached: list[int] = field(default_factory=list)
    """How often, by place in a draft, the target came to judge it."""
    accepted: list[int] = field(default_factory=list)
    """How often, by place in a draft, the target agreed."""
    verify_seconds: list[float] = field(default_factory=list)
    """Time of each of the target's passes over full drafts."""
    seconds: float = 0.0
    noise: float = 0.0
    """Largest difference of a logit to the reference, at places before which both texts agree."""


def decode_greedy(target: LoadedModel, prompt: Sequence[int], limit: int, stop: frozenset[int]) -> Greedy:
    """The reference: every token from a pass of its own. `prompt` and result are token ids."""
    stepper, text = Stepper(target), list(prompt)
    greedy = Greedy([])
    began = time.perf_counter()
    while len(greedy.tokens) < limit:
        step = time.perf_counter()
        values, tokens = stepper.logits(text)[0].topk(2)
        chosen = int(tokens[0])
        if greedy.tokens:  # the first pass is that of the prompt
            greedy.step_seconds.append(time.perf_counter() - step)
        greedy.tokens.append(chosen)
        greedy.best.append((chosen, int(tokens[1]), float(values[0]), float(values[1])))
        text.append(chosen)
        if chosen in stop:
            break
    greedy.seconds = time.perf_counter() - began
    return greedy


def decode_speculatively(
    target: LoadedModel,
    drafter: Drafter,
    prompt: Sequence[int],
    count: int,
    limit: int,
    stop: frozenset[int],
    reference: Greedy | None = None,
) -> Speculated:
    """The same by drafts of `count` tokens; with a `reference` the noise of the logits is measured too."""
    speculated = Speculated([], reached=[0] * count, accepted=[0] * count)
    began = time.perf_counter()
    apart = 0.0
    for new, logits, drafts, agreed, seconds in rounds(target, drafter, prompt, count, limit, stop):
        speculated.rounds += 1
        speculated.drafted += len(drafts)
        # The first pass holds the prompt, and a short draft costs less: neither tells what a check costs.
        if len(drafts) == count and speculated.rounds > 1:
            speculated.verify_seconds.append(seconds)
        for place in range(min(len(new), len(drafts))):
            speculated.reached[place] += 1
            speculated.accepted[place] += place < agreed
        if reference is not None:
            pause = time.perf_counter()
            speculated.noise = max(speculated.noise, _noise(reference, speculated.tokens, new, logits))
            apart += time.perf_counter() - pause
        speculated.tokens += new
    speculated.seconds = time.perf_counter() - began - apart
    return speculated


def rounds(
    target: LoadedModel,
    drafter: Drafter,
    prompt: Sequence[int],
    count: int,
    limit: int,
    stop: frozenset[int],
) -> Iterator[tuple[list[int], torch.Tensor, list[int], int, float]]:
    """Each round: new tokens, the target's logits, the draft, how much of it agreed, seconds of the pass."""
    stepper, text = Stepper(target), list(prompt)
    made = 0
    while made < limit:
        drafts = drafter.propose(text, count)
        # A draft with a larger, padded vocabulary may propose what the target has no embedding for.
        beyond = next((n for n, token in enumerate(drafts) if token >= target.vocabulary), len(drafts))
        drafts = drafts[:beyond]
        began = time.perf_counter()
        logits = stepper.logits([*text, *drafts], len(drafts) + 1)
        best = logits.argmax(-1).tolist()
        seconds = time.perf_counter() - began
        # Where the draft is wrong, the same pass has the target's own token for that place already; what
        # stands behind it rests on a wrong token and is thrown away. So each round gives one token at least.
        agreed = next((n for n, token in enumerate(drafts) if token != best[n]), len(drafts))
        new = best[: min(agreed + 1, limit - made)]
        ended = next((n + 1 for n, token in enumerate(new) if token in stop), None)
        new = new[:ended]
        yield new, logits, drafts, agreed, seconds
        text += new
        made += len(new)
        if ended:
            return


def _noise(reference: Greedy, before: list[int], new: list[int], logits: torch.Tensor) -> float:
    """Over the two likeliest tokens of the reference, where the texts agree up to that place."""
    worst = 0.0
    for offset in range(len(new)):
        place = len(before) + offset
        if place >= len(reference.tokens) or reference.tokens[:place] != [*before, *new[:offset]]:
            break
        if reference.tokens[place] != new[offset]:
            break  # the place in question must not vouch for itself
        one, other, value_one, value_other = reference.best[place]
        worst = max(
            worst,
            abs(float(logits[offset, one]) - value_one),
            abs(float(logits[offset, other]) - value_other),
        )
    return worst
