"""The tables of `[followup]` in a run's config: what comes after the release, each key named as its flag.

Model, device, template and seed are the run's. A key that is left out has the default of the command, but for
those that say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lorasmith.errors import UsageError
from lorasmith.hub.cache import hub_name
from lorasmith.records.base import Part

if TYPE_CHECKING:
    from lorasmith.followup.compression.settings import CompressSettings
    from lorasmith.followup.drafts.trainer import DraftSettings
    from lorasmith.followup.responses.respond import RespondOptions
    from lorasmith.followup.speculation.speculate import SpeculateOptions


def _several(value: Any) -> Any:
    """One value stands for a list of one."""
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


COMMANDS = ("respond", "draft", "speculate", "compress")
"""In the order in which a run does them."""


class RespondAsked(Part):
    """`[followup.respond]`: answers of the merged model."""

    data: Path | None = None
    """The run's first training file where it is left out."""
    limit: int | None = Field(default=None, gt=0)
    engine: Literal["transformers", "vllm"] = "transformers"
    system: str | None = None
    max_new_tokens: int = Field(default=1024, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    top_logprobs: int = Field(default=8, ge=0)
    """8, not 0 as for the command: a draft learns from them."""
    batch_size: int | None = Field(default=None, gt=0)

    def options(
        self, *, template: str, device: str, device_map: str | None, seed: int, price: float | None
    ) -> RespondOptions:
        """For `respond`."""
        from lorasmith.followup.responses.respond import RespondOptions
        from lorasmith.models.generation.decoding import Sampling

        return RespondOptions(
            engine=self.engine,
            template=template,
            system=self.system,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, self.top_p, self.top_k, seed),
            top_logprobs=self.top_logprobs,
            batch_size=self.batch_size,
            device=device,
            device_map=device_map,
            limit=self.limit,
            whole_groups=True,
            price_per_hour=price,
        )


class DraftAsked(Part):
    """`[followup.draft]`: a draft model from those answers."""

    base: Path | None = None
    """Folder of a small model, or its name on the hub."""
    layers: str | None = None
    """Of the merged model. A quarter of them, evenly spread, where neither is given."""
    cross_entropy_weight: float = 1.0
    kl_weight: float = 1.0
    classifier_weight: float = 0.1
    labels: Literal["auto", "data", "confidence", "none"] = "auto"
    learning_rate: float = 1e-4
    epochs: float = 3.0
    batch_size: int = 8
    max_length: int = 1024
    validation: float = 0.1
    held_out: float = 0.1
    validate_every: int = 50
    patience: int = 3

    def settings(self, *, seed: int) -> DraftSettings:
        """For `train_draft`; raises `UsageError` for a value that cannot be."""
        from lorasmith.followup.drafts.trainer import DraftSettings

        chosen = DraftSettings(**self.model_dump(exclude={"base", "layers"}), seed=seed)
        chosen.check()
        return chosen

    def kept_layers(self, total: int) -> list[int] | None:
        """Of a target of `total` layers; None where the draft begins as a base."""
        from lorasmith.followup.drafts.start import parse_layers

        if self.base is not None and self.layers is not None:
            raise UsageError("a draft begins as a base or as layers", expected="followup.draft: one of them")
        if self.base is not None:
            return None
        if self.layers is None:
            return spread_layers(total)
        kept = parse_layers(self.layers)
        if kept[-1] >= total:
            raise UsageError(
                f"followup.draft.layers: there is no layer {kept[-1]}", expected=f"layers 0 to {total - 1}"
            )
        return kept


class SpeculateAsked(Part):
    """`[followup.speculate]`: the draft tested on the prompts of the test set; without one, prompt lookup."""

    draft_tokens: tuple[int, ...] = (2, 4, 6)
    max_new_tokens: int = 128
    limit: int = 20

    def options(self, *, template: str, device: str) -> SpeculateOptions:
        """For `speculate`; raises `UsageError` for a value that cannot be."""
        from lorasmith.followup.speculation.speculate import SpeculateOptions

        chosen = SpeculateOptions(
            self.draft_tokens, self.max_new_tokens, self.limit, template, device, "float32"
        )
        chosen.check()
        return chosen


class CompressAsked(Part):
    """`[followup.compress]`: the merged model in fewer bits, each format measured on the test set."""

    formats: tuple[str, ...] = ("compressed-tensors",)
    method: Annotated[tuple[Literal["rtn", "calibrated"], ...], BeforeValidator(_several)] = ("rtn",)
    """One or both: every format in each. `calibrated` takes the rows of the run's first training file."""
    bits: Annotated[tuple[int, ...], BeforeValidator(_several)] = ()
    """Of compressed-tensors, one or several, 4 where it is left out; a GGUF type has its own."""
    group_size: int | None = None
    iterations: int = 200
    calibration_rows: int = 128
    calibration_length: int = 512
    limit: int | None = Field(default=None, gt=0)
    """Rows of the test set that the quality is measured on."""
    max_perplexity_ratio: float = 1.05
    max_mean_kl: float = 0.05
    max_q99_kl: float | None = None
    min_top1: float = 0.9
    max_accuracy_drop: float | None = None
    """0.05 where it is left out and there are questions."""
    target_size: str | None = None
    """Such as `540MB`: a gate, and refused before the run where a format does not reach it."""

    def settings(self, *, seed: int) -> list[CompressSettings]:
        """For `compress`, every combination; raises `UsageError` for values that do not go together."""
        from lorasmith.followup.compression.settings import every_way

        shared = self.model_dump(include={"iterations", "calibration_rows", "calibration_length"})
        return every_way(self.formats, self.method, self.bits, self.group_size, seed=seed, **shared)

    @property
    def limits(self) -> dict[str, float]:
        """The gates of `compress`; raises `UsageError` for a target that is no size."""
        from lorasmith.followup.compression.sizes import parse_size

        asked = {
            "perplexity_ratio": self.max_perplexity_ratio,
            "mean_kl": self.max_mean_kl,
            "top1_agreement": self.min_top1,
            "accuracy_drop": self.max_accuracy_drop,
            "q99_kl": self.max_q99_kl,
            "bytes": None if self.target_size is None else parse_size(self.target_size),
        }
        return {name: value for name, value in asked.items() if value is not None}


class FollowupAsked(Part):
    """`[followup]`: what a run does after its release; a table that is there is asked for, even empty."""

    respond: RespondAsked | None = None
    draft: DraftAsked | None = None
    speculate: SpeculateAsked | None = None
    compress: CompressAsked | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The commands that are asked for, in their order."""
        return tuple(name for name in COMMANDS if getattr(self, name) is not None)


def spread_layers(total: int) -> list[int]:
    """A quarter of the layers, at least one, evenly spread from the first to the last.

    The first reads the embeddings and the last feeds the head, so both stay; of one layer, the last.
    """
    kept = max(1, total // 4)
    if kept == 1:
        return [total - 1]
    return [round(place * (total - 1) / (kept - 1)) for place in range(kept)]


def with_named(table: Any, names: str) -> Any:
    """`[followup]` of a file with the commands of `--followup respond,draft` added where they are absent."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in asked if name not in COMMANDS]
    if unknown or not asked:
        raise UsageError(f"--followup is {names!r}", expected=f"some of {','.join(COMMANDS)}")
    known: Mapping[str, Any] = table if isinstance(table, Mapping) else {}
    return {**{name: {} for name in asked}, **known}


def from_folder(table: Any, folder: Path) -> Any:
    """`[followup]` of a config file with its paths taken relative to the file."""
    if not isinstance(table, Mapping):
        return table
    found = dict(table)
    for command, key in (("respond", "data"), ("draft", "base")):
        inner = found.get(command)
        named = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(named, str) and not (
            key == "base" and not (folder / named).exists() and hub_name(named) is not None
        ):
            found[command] = {**found[command], key: folder / named}
    return found
