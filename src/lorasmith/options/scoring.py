"""How models are run over rows: validation, the benchmarks' questions, the comparison of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from lorasmith.errors import UsageError
from lorasmith.options.base import Flag, Options
from lorasmith.options.inputs import ReadingOptions
from lorasmith.options.machine import SeedOptions, SpreadOptions
from lorasmith.options.values import Count, NamedValues, OrAuto, Template

Given = TypeVar("Given", bound="BatchOptions")


class SystemOptions(Options):
    """What the model is told before everything else."""

    PANEL: ClassVar[str] = "Scoring"

    system: Annotated[str | None, Flag(default="none")] = None
    """System prompt where a conversation has none of its own."""


class TemplateOptions(SystemOptions, ReadingOptions):
    """How rows become text."""

    PANEL: ClassVar[str] = "Scoring"

    template: Template = "auto"
    """Layout of prompts: chat (the tokenizer's chat template), plain, or auto (chat where there is one)."""
    chat_template: Annotated[Path | None, Flag(metavar="FILE|NAME", default="the tokenizer's")] = None
    """Chat template in place of the tokenizer's own: a jinja file, or the name of one of several."""
    template_args: Annotated[NamedValues, Flag(text=True, metavar="JSON", default="none")] = Field(
        default_factory=dict
    )
    """Names that the chat template may ask for, such as '{"enable_thinking": false}'."""


class ScoredOptions(TemplateOptions):
    """Which tokens of a row are learnt, or scored."""

    PANEL: ClassVar[str] = "Scoring"

    loss_on: Literal["response", "assistant", "last", "all"] = "response"
    """Tokens that are scored: response or last (the last answer), assistant (every answer of a conversation,
    but those that the row marks as not to be learnt), or all (the whole text)."""
    boundary: Literal["generation", "text"] = "generation"
    """Tokens of prompt and answer: generation (each on its own, as the model is really asked), or text (both
    as one text, as trainers do: the number to compare with a trainer's eval_loss)."""
    end_of_turn: bool = True
    """Score the token that ends a response as well."""


class EncodingOptions(TemplateOptions):
    """Whose tokens rows become."""

    PANEL: ClassVar[str] = "Scoring"

    tokenizer: Annotated[Path | None, Flag(metavar="DIR", default="the adapter's, else the model's")] = None
    """Folder whose tokenizer and chat template are used for every model."""


class ShowOptions(ScoredOptions, EncodingOptions):
    """How rows are shown."""

    PANEL: ClassVar[str] = "Scoring"

    rows: Annotated[int, Field(ge=0)] = 3
    """Number of rows that are shown."""
    full: bool = False
    """Show these rows in full, however long they are."""
    max_length: Annotated[Count | None, Flag(default="none is too long")] = None
    """Longest row in tokens; longer ones are counted."""


class BatchOptions(EncodingOptions, SpreadOptions, SeedOptions):
    """How a model is run over rows, whatever is computed there."""

    PANEL: ClassVar[str] = "Speed and memory"

    arithmetic: Literal["auto", "mkl", "onednn", "bfloat16"] = "auto"
    """Arithmetic on a CPU: auto (float32 by the faster route), mkl, onednn, or bfloat16 (not exact)."""
    batch_tokens: Annotated[Count | None, Flag(default="what suits the device")] = None
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
    """Longest row in tokens; longer ones stop the command, or are cut with --no-strict."""
    strict: bool = True
    """Stop at rows that would be cut."""


class LossOptions(ScoredOptions, BatchOptions):
    """Which tokens a loss is computed of, and how."""

    PANEL: ClassVar[str] = "Scoring"


class SampleOptions(Options):
    """Which rows of a test set are taken."""

    PANEL: ClassVar[str] = "Scoring"

    limit: Annotated[Count | None, Flag(default="all")] = None
    """Number of rows that are taken; the result is marked as partial."""
    shuffle_seed: Annotated[int | None, Flag(default="the first rows")] = None
    """Seed by which --limit draws rows at random."""

    @model_validator(mode="after")
    def _draws_among_some(self) -> Self:
        if self.shuffle_seed is not None and self.limit is None:
            raise UsageError(
                "--shuffle-seed chooses among the rows, and without --limit all are taken",
                expected="both, or neither",
            )
        return self


class AnswerOptions(BatchOptions, SampleOptions):
    """How the benchmarks' questions are put to a model."""


class ScoringOptions(LossOptions, AnswerOptions):
    """How the losses of rows are computed: what validation and comparison have in common."""


class ValidateOptions(ScoringOptions):
    """What a caller of `validate` may choose."""

    PANEL: ClassVar[str] = "Scoring"

    states: Annotated[Path | None, Flag(metavar="DIR", default="not kept")] = None
    """Folder that keeps the model's hidden states at the scored positions for `compare`."""


class GenerateOptions(Options):
    """Whether texts are compared as well."""

    PANEL: ClassVar[str] = "Scoring"

    generate: Annotated[Count | None, Flag(default="none")] = None
    """Number of tokens that adapter and merged model also write after each prompt, to see where they part."""


class CompareOptions(ScoringOptions, GenerateOptions):
    """What a caller of `compare` may choose."""

    PANEL: ClassVar[str] = "Scoring"

    states: Annotated[Path | None, Flag(metavar="DIR", default="computed again")] = None
    """Folder in which `validate` kept hidden states; what is missing there is added."""

    @model_validator(mode="after")
    def _tells_models_apart(self) -> Self:
        return require_float32(self)


def require_float32(options: Given) -> Given:
    """Raise `UsageError` for an arithmetic in which two models cannot be told apart."""
    if options.arithmetic == "bfloat16":
        raise UsageError(
            "bfloat16 arithmetic cannot tell the two models apart", expected="auto, mkl or onednn"
        )
    return options


class CodeOptions(Options):
    """Where code that a model wrote is run."""

    PANEL: ClassVar[str] = "Scoring"

    run_code_anyway: bool = False
    """Run code that a model wrote (HumanEval, MBPP) even without all protection; a finding says so."""


class TaskOptions(CodeOptions):
    """Whether questions are put."""

    PANEL: ClassVar[str] = "Scoring"

    tasks: bool = False
    """Put the benchmarks' questions as well, and score the answers."""
    task_module: Annotated[Path | None, Flag(metavar="FILE", default="none")] = None
    """Python file with a metric of your own, for --tasks (docs/own-metric.md); it runs with your rights."""

    max_new_tokens: Annotated[Count | None, Flag(default="what the benchmark's own answers need")] = None
    """Longest answer in tokens that a model may write to a question, for --tasks."""

    @model_validator(mode="after")
    def _asks_where_it_judges(self) -> Self:
        if self.task_module is not None and not self.tasks:
            raise UsageError(
                "--task-module without --tasks: no answer would be judged",
                expected="both or none",
                remedy="add --tasks",
            )
        return self
