"""All options of a run, as flags (`--test-set`) and as keys of `run.toml` (`test_set`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lorasmith.errors import UsageError
from lorasmith.options.base import Flag, Options
from lorasmith.options.followup import (
    FormatOptions,
    LearningOptions,
    QualityOptions,
    ResponseOptions,
    SpeculationOptions,
    StartOptions,
)
from lorasmith.options.inputs import AdapterInput, BaseInput, PriceOptions, RowsInput
from lorasmith.options.machine import ClusterOptions
from lorasmith.options.merging import RoundingOptions
from lorasmith.options.scoring import GenerateOptions, LossOptions, TaskOptions, require_float32
from lorasmith.options.values import Dollars, OneOrSeveral
from lorasmith.records.release import Gate


class RespondTable(ResponseOptions):
    """Table `[followup.respond]`: answers of the merged model."""

    data: Annotated[Path | None, Flag(metavar="FILE", default="the first training file")] = None
    """JSONL whose rows are answered."""
    top_logprobs: Annotated[int, Field(ge=0)] = 8
    """Number of likeliest tokens whose log-probabilities are kept; a draft model learns from them."""


class DraftTable(LearningOptions, StartOptions):
    """Table `[followup.draft]`: a draft model from those answers, by itself from a quarter of the layers."""


class SpeculateTable(SpeculationOptions):
    """Table `[followup.speculate]`: the draft tested on the prompts of the test set, or prompt lookup."""


class CompressTable(FormatOptions, QualityOptions):
    """Table `[followup.compress]`: the merged model in fewer bits, each format measured on the test set."""


class FollowupOptions(Options):
    """What a run does after its release, in this order; a table that is there is asked for, even empty."""

    respond: RespondTable | None = None
    """Answers of the merged model."""
    draft: DraftTable | None = None
    """Draft model from those answers."""
    speculate: SpeculateTable | None = None
    """Test of speculative decoding."""
    compress: CompressTable | None = None
    """Model in fewer bits."""

    @property
    def named(self) -> tuple[str, ...]:
        """The steps that are asked for, in their order."""
        return tuple(name for name, table in self.values().items() if table is not None)


def tables_named(names: str) -> dict[str, Any]:
    """`respond,draft` as empty tables; raises `UsageError` for what there is not."""
    asked, known = [name.strip() for name in names.split(",") if name.strip()], FollowupOptions.model_fields
    if not asked or not set(asked) <= set(known):
        raise UsageError(f"--followup is {names!r}", expected=f"some of {','.join(known)}")
    return {name: {} for name in known if name in asked}


def _by_names(value: Any) -> Any:
    return tables_named(value) if isinstance(value, str) else value


class GateOptions(Options):
    """What a run is judged by."""

    PANEL: ClassVar[str] = "Gates"

    gate_defaults: Annotated[Literal["guide", "none"], Flag(hidden=True)] = "guide"
    """Gates that are there without being named: those of the guide, or none."""
    gates: Annotated[tuple[Gate, ...], Flag(hidden=True)] = ()
    """Gates beside the defaults; one with the name of a default replaces it."""
    behaviour_thresholds: Annotated[dict[str, float], Flag(hidden=True)] = Field(default_factory=dict)
    """Thresholds of the grade of the behaviour, in place of some of the defaults."""


class PackageOptions(Options):
    """What is shipped."""

    PANEL: ClassVar[str] = "Package"

    compression: Literal["gzip", "zstd", "none"] = "gzip"
    """Compression of the archives."""


class CardOptions(Options):
    """What the card says of the merged model, beside what the records tell."""

    PANEL: ClassVar[str] = "Package"

    model_name: Annotated[str | None, Flag(default="its folder's")] = None
    """Name of the merged model in its card."""
    base_model_id: Annotated[
        Annotated[str, Field(pattern=r"^[\w-][\w.-]*/[\w-][\w.-]*$")] | None,
        Flag(metavar="ORG/NAME", default="as the hub's cache or base and adapter name it"),
    ] = None
    """Name of the base on the hub, for the card."""


class LimitOptions(PriceOptions):
    """What a run must not need."""

    PANEL: ClassVar[str] = "Cost"

    budget: Annotated[Dollars | None, Flag(default="no limit")] = None
    """Largest cost in dollars, with --price-per-hour; a run that reaches it stops, and can be continued."""


class MemoryOptions(Options):
    """What is looked at before a run starts."""

    PANEL: ClassVar[str] = "Speed and memory"

    check_memory: bool = True
    """Refuse to start where the model cannot lie in memory in the type it is scored in."""


class RunPlaces(Options):
    """What a run writes, and what its adapter was trained on."""

    output: Annotated[Path, Flag(metavar="RUN")]
    """The run folder."""
    train: Annotated[tuple[Path, ...], OneOrSeveral, Flag(metavar="FILE", default="none")] = ()
    """JSONL that the adapter was trained on: the test set is checked against it, rounding is fitted to it."""


class StepsOptions(Options):
    """Which steps follow the release."""

    followup: Annotated[
        FollowupOptions | None, BeforeValidator(_by_names), Flag(text=True, metavar="STEPS", default="none")
    ] = None
    """Steps after the release, of respond,draft,speculate,compress; their options stand in the config."""


class RunOptions(
    BaseInput,
    AdapterInput,
    RowsInput,
    RunPlaces,
    StepsOptions,
    RoundingOptions,
    TaskOptions,
    GenerateOptions,
    LossOptions,
    GateOptions,
    PackageOptions,
    CardOptions,
    MemoryOptions,
    LimitOptions,
    ClusterOptions,
):
    """What a run is asked to do."""

    @model_validator(mode="after")
    def _can_be_proved(self) -> Self:
        return require_float32(self)
