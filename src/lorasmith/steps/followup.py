"""What comes after the release, where it is asked for: responses, draft model, speculation, fewer bits.

Only records go into the package; responses, draft and compressed models stay in the run folder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lorasmith
from lorasmith.files.atomic import publish_folder
from lorasmith.followup.asked import CompressAsked, DraftAsked, FollowupAsked, RespondAsked, SpeculateAsked
from lorasmith.records.base import Record
from lorasmith.records.compression import CompressRecord
from lorasmith.records.draft import DraftRecord
from lorasmith.records.followup import RespondRecord, SpeculationRecord
from lorasmith.results import COMPRESS_RECORD, COMPRESSED, DRAFT, FOLLOWUP, RESPONSES, SPECULATION
from lorasmith.stages import Stage
from lorasmith.steps.base import RunContext, Step
from lorasmith.steps.followup_places import compress_options, layer_count, response_data, work_folder


def follow_up(run: RunContext) -> list[Step]:
    """The steps that `[followup]` names, in the order in which they need each other."""
    asked = run.config.followup or FollowupAsked()
    steps = []
    if asked.respond is not None:
        steps.append(_respond(run, asked.respond))
    if asked.draft is not None:
        steps.append(_draft(run, asked.draft))
    if asked.speculate is not None:
        steps.append(_speculate(run, asked.speculate, drafted=asked.draft is not None))
    if asked.compress is not None:
        steps += _compress(run, asked.compress)
    return steps


def packed_records(run: RunContext) -> dict[str, type[Record]]:
    """The records that the steps leave for the package, below the run folder."""
    return {name: kind for step in follow_up(run) for name, kind in step.shows.items()}


def _respond(run: RunContext, asked: RespondAsked) -> Step:
    config = run.config
    data = response_data(config)
    own: dict[str, Any] = {
        name: getattr(config, name) for name in ("template", "device", "device_map", "seed")
    }
    stage = Stage(
        name="respond",
        inputs={"model": run.merged, "data": data},
        parameters={**asked.model_dump(mode="json", exclude={"data"}), **own},
        outputs=[str(Path(RESPONSES).parent)],
        action=lambda: _answer(run, data, stage, asked.options(**own, price=config.price_per_hour)),
    )
    return Step("Responses of the merged model", stage, {RESPONSES: RespondRecord})


def _answer(run: RunContext, data: Path, stage: Stage, options: Any) -> None:
    """Answer all rows, those that failed once more, and put aside what differs between two runs."""
    from dataclasses import replace

    from lorasmith.followup.respond import choose_engine

    final = run.folder / RESPONSES
    work = work_folder(run.folder, stage)
    engine = choose_engine(run.merged, None, options, run.executor)
    with run.progress("Respond", total=_count(data, options.limit), unit="row") as advance:
        ask = partial(
            lorasmith.respond, run.merged, data, work / "responses.jsonl",
            watcher=_Follow(run, advance), engine=engine,
        )  # fmt: skip
        if ask(options=options).failed:
            ask(options=replace(options, retry_failed=True))
    for ending in ("timing.json", "chunks.jsonl"):  # of this machine or cluster, not of what it wrote
        aside = work / f"responses.{ending}"
        if aside.is_file():
            aside.replace(run.folder / FOLLOWUP / aside.name)
    publish_folder(work, final.parent)


def _count(data: Path, limit: int | None) -> int:
    from lorasmith.followup.respond_rows import read_prompts

    return len(read_prompts(data, limit))


class _Follow:
    """Shows rows as a bar, and at once what may save hours."""

    def __init__(self, run: RunContext, advance: Any) -> None:
        self.run, self.advance = run, advance

    def began(self, rows: int, done: int) -> None:
        self.advance(done)

    def moved(self, rows: int, tokens: int) -> None:
        self.advance(rows)

    def found(self, finding: object) -> None:
        self.run.show("respond", finding)


def _draft(run: RunContext, asked: DraftAsked) -> Step:
    config = run.config
    responses = run.folder / Path(RESPONSES).parent
    stage = Stage(
        name="draft",
        inputs={"target": run.merged, "responses": responses, **({"base": asked.base} if asked.base else {})},
        parameters={
            **asked.model_dump(mode="json", exclude={"base"}),
            "device": config.device,
            "seed": config.seed,
        },
        outputs=[str(Path(DRAFT).parent)],
        action=lambda: _train(run, responses, stage, asked),
    )
    return Step("Train a draft model", stage, {DRAFT: DraftRecord})


def _train(run: RunContext, responses: Path, stage: Stage, asked: DraftAsked) -> None:
    work = work_folder(run.folder, stage)
    made = work / "draft"
    lorasmith.train_draft(
        run.merged,
        responses / Path(RESPONSES).with_suffix(".jsonl").name,
        made,
        base=asked.base,
        layers=asked.kept_layers(layer_count(run.merged)),
        settings=asked.settings(seed=run.config.seed),
        device=run.config.device,
        progress=run.progress,
    )
    publish_folder(made, (run.folder / DRAFT).parent)


def _speculate(run: RunContext, asked: SpeculateAsked, *, drafted: bool) -> Step:
    config = run.config
    draft = (run.folder / DRAFT).parent if drafted else None
    own = {"template": config.template, "device": config.device}
    stage = Stage(
        name="speculate",
        inputs={"target": run.merged, "prompts": run.test_set, **({"draft": draft} if draft else {})},
        parameters={**asked.model_dump(mode="json"), **own},
        outputs=[SPECULATION],
        action=lambda: lorasmith.speculate(
            run.merged,
            run.test_set,
            draft=draft,
            output=run.folder / SPECULATION,
            options=asked.options(**own),
            progress=run.progress,
        ),
    )
    return Step("Test speculative decoding", stage, {SPECULATION: SpeculationRecord})


def _compress(run: RunContext, asked: CompressAsked) -> list[Step]:
    config = run.config
    options = compress_options(asked, config, run.test_set)
    steps = []
    for settings in asked.settings(seed=config.seed):
        inputs = {"model": run.merged, "test_set": run.test_set}
        if settings.method == "calibrated":
            inputs["calibration"] = config.train[0]
        place = f"{COMPRESSED}/{settings.name}"
        stage = Stage(
            name=f"compress-{settings.name}",
            inputs=inputs,
            parameters={
                **vars(settings),
                "limit": asked.limit,
                "limits": asked.limits,
                "tasks": config.tasks,
                "device": config.device,
            },
            outputs=[place],
            action=partial(
                lorasmith.compress,
                run.merged,
                run.folder / place,
                settings=settings,
                options=options,
                progress=run.progress,
            ),
        )
        shows = {f"{place}/{COMPRESS_RECORD}": CompressRecord}
        steps.append(Step(f"Compress to {settings.format} ({settings.method})", stage, shows))
    return steps
