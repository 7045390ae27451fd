"""One heading of the run, and what all of them are told: config, progress, places in the run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasmith.executors.base import Executor
from lorasmith.executors.choose import make_executor
from lorasmith.files.run_layout import MERGED, TEST_SET, RunFile
from lorasmith.options import ClusterOptions, LossOptions, RunOptions
from lorasmith.progress import Progress, Unwatched, Watcher
from lorasmith.runs.stages import Stage


@dataclass(frozen=True)
class Step:
    """A stage under its heading, and the records that tell what came of it."""

    title: str
    stage: Stage
    shows: tuple[RunFile[Any], ...] = ()


@dataclass(frozen=True)
class RunContext:
    """A run as its steps see it."""

    config: RunOptions
    watcher: Watcher = field(default_factory=Unwatched)

    @property
    def progress(self) -> Progress:
        """The bars of who follows the run."""
        return self.watcher.progress

    @cached_property
    def executor(self) -> Executor:
        """Where models run over rows and shards are merged."""
        return make_executor(ClusterOptions.taken_from(self.config))

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.output

    @property
    def test_set(self) -> Path:
        """The run's own copy."""
        return self.folder / TEST_SET

    @property
    def merged(self) -> Path:
        """The merged model."""
        return self.folder / MERGED

    @property
    def models(self) -> dict[str, Path]:
        """Base and adapter, as inputs of a stage."""
        return {"base": self.config.base, "adapter": self.config.adapter}

    @cached_property
    def base_tokenizer(self) -> Path | None:
        """The adapter's folder, where the base alone would make other tokens of the rows than the adapter."""
        from lorasmith.models.load import tokenizer_for_both

        if self.config.tokenizer is not None:
            return self.config.tokenizer
        return tokenizer_for_both(self.config.base, self.config.adapter)

    @property
    def scoring(self) -> LossOptions:
        """Options that validation and comparison share."""
        return LossOptions.taken_from(self.config)


def numbered(name: str, paths: tuple[Path, ...]) -> dict[str, Path]:
    """Several files as inputs of a stage."""
    return {f"{name} {number}": path for number, path in enumerate(paths, 1)}
