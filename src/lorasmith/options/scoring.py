"""How models are run over rows: validation, the benchmarks' questions, the comparison of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from lorasmith.options.base import Flag, Options
from lorasmith.options.machine import SeedOptions, SpreadOptions
from lorasmith.options.values import Count, OrAuto, Template


class TemplateOptions(Options):
    """How rows become text."""

    PANEL: ClassVar[str] = "Scoring"

    template: Template = "auto"
    """Layout of prompts: chat (the tokenizer's chat template), plain, or auto (chat where there is one)."""


class AnswerOptions(TemplateOptions, SpreadOptions, SeedOptions):
    """How a model is run over rows, whatever is computed there."""

    PANEL: ClassVar[str] = "Speed and memory"

    arithmetic: Literal["auto", "mkl", "onednn", "bfloat16"] = "auto"
    """Arithmetic on a CPU: auto (float32 by the faster route), mkl, onednn, or bfloat16 (not exact)."""
    batch_tokens: Annotated[Count | None, Flag(default="what the memory allows")] = None
    """Largest number of tokens in a batch."""
    batch_size: Annotated[
        Count | None,
        OrAuto,
        Flag(
            metavar="INTEGER|auto", text=True, default="what its tokens allow, halved where memory is short"
        ),
    ] = None
    """Largest number of rows in a batch."""
    max_length: Annotated[Count | None, Flag(default="the model's context")] = None
    """Longest row in tokens; longer ones are cut, or stop the command (--strict)."""
    strict: bool = True
    """Stop at rows that would be cut."""


class ScoringOptions(AnswerOptions):
    """How the losses of rows are computed."""

    PANEL: ClassVar[str] = "Scoring"

    loss_on: Literal["response", "all"] = "response"
    """Tokens that are scored: those of the response, or all for full-text loss."""
    end_of_turn: bool = True
    """Score the token that ends a response as well."""


class SampleOptions(Options):
    """Which rows of a test set are taken."""

    PANEL: ClassVar[str] = "Scoring"

    limit: Annotated[Count | None, Flag(default="all")] = None
    """Number of rows that are taken; the result is marked as partial."""
    shuffle_seed: Annotated[int | None, Flag(default="the first rows")] = None
    """Seed by which --limit draws rows at random."""


class ValidateOptions(ScoringOptions, SampleOptions):
    """What a caller of `validate` may choose."""

    states: Annotated[Path | None, Flag(metavar="DIR", default="not kept")] = None
    """Folder that keeps the model's hidden states for `compare`."""


class CompareOptions(ScoringOptions, SampleOptions):
    """What a caller of `compare` may choose."""

    generate: Annotated[Count | None, Flag(default="none")] = None
    """Number of tokens that both models also write after each prompt, to see where they part."""
    states: Annotated[Path | None, Flag(metavar="DIR", default="computed again")] = None
    """Folder in which `validate` kept a model's hidden states."""
