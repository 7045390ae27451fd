"""The two models of a comparison, loaded one after the other, and what each leaves behind."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorasmith.executors.base import Executor, Recipe
from lorasmith.executors.log import ChunkLog
from lorasmith.files.journal import Journal
from lorasmith.models.arithmetic import Route
from lorasmith.models.inputs import Inputs
from lorasmith.models.load import LoadedModel, has_tokenizer
from lorasmith.models.memory import release_memory
from lorasmith.models.replica import OPEN_SCORING, Replica
from lorasmith.models.session import ScoringOptions, Workload, identify, prepare
from lorasmith.models.states import open_states
from lorasmith.progress import Progress
from lorasmith.proving.behaviour_fit import (
    announced_vocabulary,
    check_vocabulary,
    compare_tokenizers,
    model_config,
)
from lorasmith.proving.behaviour_generation import TextJournals, Texts, compare_texts, write_texts
from lorasmith.proving.behaviour_measure import Floor, Side, is_finite, noise_floor, run_side, serving_floor
from lorasmith.records.base import Finding
from lorasmith.records.proof import GenerationComparison
from lorasmith.records.scoring import ModelIdentity


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, and how."""

    inputs: Inputs
    """Base, adapter and merged model, and the test set."""
    options: ScoringOptions
    generate: int | None
    progress: Progress
    route: Route
    states: Path
    """Folder of the hidden states."""
    texts: TextJournals
    executor: Executor
    log: ChunkLog

    @property
    def base(self) -> Path:
        """Folder of the base."""
        return self.inputs.folders[0]

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        return self.inputs.folders[1]

    @property
    def merged(self) -> Path:
        """Folder of the merged model."""
        return self.inputs.folders[2]

    @property
    def test_set(self) -> Path:
        """Its rows go to both."""
        return self.inputs.test_set


@dataclass(frozen=True)
class MergedRun:
    """What is left of the merged model."""

    side: Side
    identity: ModelIdentity
    texts: Texts | None


@dataclass(frozen=True)
class AdapterRun:
    """What is left of the adapter, and what it says of itself."""

    side: Side
    identity: ModelIdentity
    texts: Texts | None
    work: Workload
    tokenizer: Any
    floor: Floor
    serving: Floor | None
    obstacles: list[str] = field(default_factory=list)
    """What forbids a good grade."""
    findings: list[Finding] = field(default_factory=list)


def run_adapter(asked: Comparison, stack: ExitStack) -> AdapterRun:
    """Run the adapter on its base and measure its floors; the journal of its states stays open on `stack`."""
    loaded = asked.options.load(asked.base, adapter=asked.adapter)
    check_vocabulary(loaded.vocabulary, announced_vocabulary(asked.merged), asked.merged)
    work = prepare(asked.test_set, loaded, asked.options, asked.route)
    asked.inputs.require_unchanged()
    identity = identify("adapter", asked.base, asked.adapter, loaded)
    obstacles, findings = compare_tokenizers(work, asked.merged)
    journal = stack.enter_context(
        open_states(asked.states / "adapter.journal", [asked.base, asked.adapter], loaded, work, asked.route)
    )
    replica = Replica.of(work, asked.base, asked.adapter, asked.test_set, asked.options, asked.route)
    side = _side(asked, "adapter", work, loaded, journal, replica)
    floor = noise_floor(loaded, work, side, asked.route, asked.progress)
    texts = _texts(asked, "adapter", work, loaded, replica)
    tokenizer = loaded.tokenizer
    del loaded
    release_memory()
    serving = _serving(asked, work, side, findings)
    return AdapterRun(side, identity, texts, work, tokenizer, floor, serving, obstacles, findings)


def run_merged(asked: Comparison, work: Workload, stack: ExitStack) -> MergedRun:
    """The same for the merged model, on the adapter's tokens."""
    own = asked.merged if has_tokenizer(asked.merged) else asked.base
    loaded = asked.options.load(asked.merged, tokenizer_from=own)
    asked.inputs.require_unchanged()
    identity = identify("merged", asked.merged, None, loaded)
    path = asked.states / "merged.journal"
    journal = stack.enter_context(open_states(path, [asked.merged], loaded, work, asked.route))
    encoder = asked.adapter if has_tokenizer(asked.adapter) else asked.base
    replica = Replica.of(work, asked.merged, None, asked.test_set, asked.options, asked.route, encoder)
    side = _side(asked, "merged", work, loaded, journal, replica)
    texts = _texts(asked, "merged", work, loaded, replica)
    return MergedRun(side, identity, texts)


def generation_of(asked: Comparison, a: AdapterRun, b: MergedRun) -> GenerationComparison | None:
    """Their texts compared, where some were asked for."""
    if asked.generate is None or a.texts is None or b.texts is None:
        return None
    return compare_texts(a.work.examples, a.texts, b.texts, a.tokenizer, asked.generate)


def _side(
    asked: Comparison, part: str, work: Workload, loaded: LoadedModel, journal: Journal, replica: Replica
) -> Side:
    recipe = Recipe(OPEN_SCORING, {"replica": replica, "keep": True}, replica.gpu)
    label, log = f"Run {part}", asked.log.part(part)
    return run_side(loaded, work, asked.route, journal, label, asked.progress, asked.executor, recipe, log)


def _texts(
    asked: Comparison, part: str, work: Workload, loaded: LoadedModel, replica: Replica
) -> Texts | None:
    if asked.generate is None:
        return None
    label, log = f"Generate ({part})", asked.log.part(f"{part} texts")
    return write_texts(
        work,
        loaded,
        asked.route,
        asked.generate,
        label,
        (asked.texts.get(part), asked.texts.get(f"{part} alone")),
        asked.progress,
        asked.executor,
        replica,
        log,
    )


def _serving(asked: Comparison, work: Workload, side: Side, findings: list[Finding]) -> Floor | None:
    """The adapter in the 16 bits that the merged model, else the base, is stored in; None for float32."""
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    stored = [model_config(folder) for folder in (asked.merged, asked.base)]
    named = [str(config.get("dtype") or config.get("torch_dtype")) for config in stored]
    dtype = next((types[name] for name in named if name in types), None)
    if dtype is None:
        return None
    loaded = asked.options.load(asked.base, adapter=asked.adapter, dtype=dtype)
    floor = serving_floor(loaded, work, side, asked.route, asked.progress)
    del loaded
    release_memory()
    if is_finite(floor.rows):
        return floor
    findings.append(
        Finding(
            severity="warning",
            code="serving-overflow",
            message=f"computed in {str(dtype).removeprefix('torch.')}, the adapter gives numbers that are "
            "not finite",
            where=asked.adapter.name,
            remedy="serve it in bfloat16 or float32",
        )
    )
    return None
