"""The models and files that commands are given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from lorasmith.options.base import Flag, Options
from lorasmith.options.values import Dollars, Model, WithCommas


class BaseInput(Options):
    """The base of an adapter."""

    base: Model
    """Folder of the base, or org/name[@revision] on the Hugging Face hub."""


class AdapterInput(Options):
    """One adapter."""

    adapter: Annotated[Path, Flag(metavar="DIR")]
    """Folder of the LoRA adapter."""


class AdaptersInput(Options):
    """Adapters that are summed."""

    adapter: Annotated[tuple[Path, ...], Flag(metavar="DIR"), Field(min_length=1)]
    """Folder of the LoRA adapter; several are summed."""
    weight: Annotated[tuple[float, ...], Flag(default="1 for each")] = ()
    """Weight of each adapter, in their order."""


class MergedInput(Options):
    """A merged model."""

    merged: Annotated[Path, Flag(metavar="DIR")]
    """Folder of the merged model."""


class ModelInput(Options):
    """A model that is to be scored, with an adapter on it or without."""

    model: Model
    """Folder of a base or a merged model, or org/name[@revision] on the Hugging Face hub."""
    adapter: Annotated[Path | None, Flag(metavar="DIR", default="none")] = None
    """Folder of an adapter on top of the model, unmerged."""


class TargetInput(Options):
    """A model that a draft speeds up."""

    target: Annotated[Path, Flag(metavar="DIR")]
    """Folder of the model that is to be sped up."""


class ReadingOptions(Options):
    """How rows are read."""

    columns: Annotated[
        tuple[str, ...], WithCommas, Flag(text=True, metavar="KEY=FIELD", default="by layout")
    ] = ()
    """Fields of rows whose layout is not known: prompt, response, messages, system, tools, text or id, such
    as prompt=question,response=best_answer."""
    skip_bad_rows: bool = False
    """Set rows that cannot be used aside and count them, in place of stopping at the first."""


class RowsInput(Options):
    """Rows that are scored."""

    test_set: Annotated[Path, Flag(metavar="FILE")]
    """Rows to score: a file, a folder of files, or org/name[:split] on the Hugging Face hub."""


class PriceOptions(Options):
    """What the machine costs."""

    PANEL: ClassVar[str] = "Cost"

    price_per_hour: Annotated[Dollars | None, Flag(default="no cost is shown")] = None
    """Price of the machine in dollars an hour."""


class CompareInput(BaseInput, AdapterInput, MergedInput, RowsInput):
    """An adapter and its merge, on the same rows."""
