"""What comes after the release, where it is asked for: responses, draft model, speculation, fewer bits.

Only records go into the package; responses, draft and compressed models stay in the run folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorasmith.checkpoint.model import open_checkpoint, text_config
from lorasmith.errors import InputError, UsageError, os_errors
from lorasmith.files import run_layout as layout
from lorasmith.files.atomic import publish_folder
from lorasmith.files.digests import digest_path
from lorasmith.files.run_layout import (
    DRAFT,
    RESPONSE_CHUNKS,
    RESPONSES,
    RESPONSES_SPEED,
    SPECULATION,
    SPECULATION_SPEED,
    RunFile,
)
from lorasmith.followup.compression.settings import every_way, limits_of, only_way
from lorasmith.followup.drafts.layers import kept_layers
from lorasmith.hub.models import local_model
from lorasmith.options import (
    CompressOptions,
    CompressTable,
    DraftOptions,
    DraftTable,
    FollowupOptions,
    RespondOptions,
    RespondTable,
    RunOptions,
    SpeculateOptions,
    SpeculateTable,
)
from lorasmith.progress import Progress
from lorasmith.quantized.open import open_base
from lorasmith.runs.stages import Stage
from lorasmith.runs.step import RunContext, Step

# Where the follow-up steps read and write, what is no longer theirs, what is refused before a run begins.


def work_folder(run: Path, stage: Stage) -> Path:
    """Where a step begins or goes on; the leftovers of the same step with other inputs are removed."""
    asked = {name: digest_path(path) for name, path in stage.inputs.items()}
    body = json.dumps([stage.version, asked, dict(stage.parameters)], sort_keys=True, default=str)
    name = f"{stage.name}-{hashlib.sha256(body.encode()).hexdigest()[:16]}"
    folder = run / layout.FOLLOWUP_WORK / name
    with os_errors(folder, "write"):
        for other in (run / layout.FOLLOWUP_WORK).glob(f"{stage.name}-*"):
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (run / layout.FOLLOWUP).mkdir(exist_ok=True)
    return folder


def response_data(config: RunOptions) -> Path:
    """The rows that are answered; raises `UsageError` where there are none."""
    asked = config.followup.respond if config.followup else None
    if asked is not None and asked.data is not None:
        return asked.data
    if not config.train:
        raise UsageError(
            "there are no rows to answer", remedy="give --train FILE.jsonl, or followup.respond.data"
        )
    return config.train[0]


def forget_unasked(config: RunOptions) -> None:
    """Remove what an earlier command left of steps that are not asked for now: it is no part of this run."""
    asked, run = config.followup or FollowupOptions(), config.output
    left = {
        "respond": (_folder(RESPONSES), RESPONSES_SPEED.path, RESPONSE_CHUNKS),
        "draft": (_folder(DRAFT),),
        "speculate": (SPECULATION.path, SPECULATION_SPEED.path),
    }
    for name, paths in left.items():
        for path in (*paths, f"{layout.STAGES}/{name}.json"):
            if name not in asked.named:
                _remove(run / path)
    wanted = {way.name for way in every_way(asked.compress, config.seed)} if asked.compress else set()
    compressed = run / layout.COMPRESSED_MODELS
    for place in (*compressed.glob("*"), *(run / layout.STAGES).glob("compress-*.json")):
        if place.name.removeprefix("compress-").removesuffix(".json") not in wanted:
            _remove(place)
    for folder in (compressed, run / layout.FOLLOWUP):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _folder(file: RunFile[Any]) -> str:
    """The folder that a step publishes with its record, below the run folder."""
    return file.path.rpartition("/")[0]


def _remove(path: Path) -> None:
    with os_errors(path, "remove"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def with_local_draft(config: RunOptions, progress: Progress) -> RunOptions:
    """The config with the draft's own model as a folder, downloaded where it is a name of the hub."""
    asked = config.followup
    if asked is None or asked.draft is None or asked.draft.from_model is None:
        return config
    draft = asked.draft.model_copy(
        update={"from_model": local_model(asked.draft.from_model, progress=progress)}
    )
    return config.model_copy(update={"followup": asked.model_copy(update={"draft": draft})})


def check_followup(config: RunOptions) -> None:
    """Refuse now what would fail after hours; nothing is loaded but tokenizers. `config.base` is a folder."""
    asked = config.followup
    if asked is None:
        return
    if asked.respond is not None:
        data = response_data(config)
        if not data.is_file():
            raise InputError("followup.respond.data does not exist", where=data, expected="a JSONL file")
        from lorasmith.followup.responses.rows import read_prompts

        read_prompts(data, asked.respond.limit)
    if asked.draft is not None:
        if asked.respond is None:
            raise UsageError(
                "a draft model learns from responses, which are not asked for",
                remedy="ask for respond as well: --followup respond,draft",
            )
        _check_draft(asked.draft, config)
    if asked.compress is not None:
        _check_compress(asked.compress, config)
        if find_spec("auto_round") is None:
            raise InputError(
                "compression needs auto-round, which is not installed",
                remedy="pip install 'lorasmith[compress]'",
            )


def _check_compress(asked: CompressTable, config: RunOptions) -> None:
    """The base has the shapes of the merged model, so what its files refuse the merged model's would."""
    from lorasmith.followup.compression.compress import prepare_compression

    if "calibrated" in asked.method and not config.train:
        raise UsageError("calibrated compression needs rows", remedy="give --train FILE.jsonl")
    base = open_base(Path(config.base))
    if base.decoded and config.into == "base":
        raise UsageError(
            "the merged model keeps the base's quantized format, and is not compressed again",
            where=config.base,
            expected="--into 16bit, whose merged model can be",
            remedy="leave compress out of the steps after the release",
        )
    options = compress_options(asked, config, config.test_set)
    for way in every_way(asked, config.seed):
        prepare_compression(base, way, options)


def compress_options(asked: CompressTable, config: RunOptions, test_set: Path) -> CompressOptions:
    """What every format of a run has in common; they share what the original model gave."""
    rows = config.train[0] if "calibrated" in asked.method else None
    return CompressOptions.taken_from(asked, config, calibration=rows, test_set=test_set)


def layer_count(folder: Path) -> int:
    """Number of layers that the config of a model folder names."""
    config = text_config(open_base(folder).config)
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if not isinstance(count, int):
        raise UsageError("the config does not say how many layers there are", where=folder)
    return count


def _check_draft(asked: DraftTable, config: RunOptions) -> None:
    kept_layers(asked, layer_count(Path(config.base)))
    if asked.from_model is None:
        return
    from lorasmith.followup.drafts.start import require_same_tokenizer
    from lorasmith.models.load import load_tokenizer

    open_checkpoint(asked.from_model)
    ours, theirs = load_tokenizer(asked.from_model), load_tokenizer(Path(config.base))
    require_same_tokenizer(ours, theirs, asked.from_model, Path(config.base))


def followup_steps(run: RunContext) -> list[Step]:
    """The steps that `[followup]` names, in the order in which they need each other."""
    asked = run.config.followup or FollowupOptions()
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


def packed_records(run: RunContext) -> list[RunFile[Any]]:
    """The records that the steps leave for the package."""
    return [file for step in followup_steps(run) for file in step.shows]


def _respond(run: RunContext, asked: RespondTable) -> Step:
    data = response_data(run.config)
    options = RespondOptions.taken_from(asked, run.config, whole_groups=True)
    stage = Stage(
        name="respond",
        inputs={"model": run.merged, "data": data},
        parameters=options.model_dump(mode="json", exclude={"price_per_hour", "retry_failed"}),
        outputs=[_folder(RESPONSES)],
        action=lambda: _answer(run, data, stage, options),
    )
    return Step("Responses of the merged model", stage, (RESPONSES,))


def _answer(run: RunContext, data: Path, stage: Stage, options: RespondOptions) -> None:
    """Answer all rows, those that failed once more, and put aside what differs between two runs."""
    from lorasmith.followup.responses.respond import choose_engine, respond

    final = RESPONSES.at(run.folder)
    work = work_folder(run.folder, stage)
    engine = choose_engine(run.merged, None, options, run.executor)
    ask = partial(respond, run.merged, data, work / "responses.jsonl", watcher=run.watcher, loaded=engine)
    if ask(options=options).failed:
        ask(options=options.model_copy(update={"retry_failed": True}))
    for name in (RESPONSES_SPEED.path, RESPONSE_CHUNKS):  # of this machine or cluster, not of what it wrote
        aside = work / Path(name).name
        if aside.is_file():
            aside.replace(run.folder / name)
    publish_folder(work, final.parent)


def _draft(run: RunContext, asked: DraftTable) -> Step:
    responses = RESPONSES.at(run.folder).parent
    start = {"start": asked.from_model} if asked.from_model else {}
    options = DraftOptions.taken_from(asked, run.config)
    stage = Stage(
        name="draft",
        inputs={"target": run.merged, "responses": responses, **start},
        parameters={**options.values(), "layers": asked.layers},
        outputs=[_folder(DRAFT)],
        action=lambda: _train(run, responses, stage, asked, options),
    )
    return Step("Train a draft model", stage, (DRAFT,))


def _train(run: RunContext, responses: Path, stage: Stage, asked: DraftTable, options: DraftOptions) -> None:
    from lorasmith.followup.drafts.draft import train_draft

    work = work_folder(run.folder, stage)
    made = work / "draft"
    train_draft(
        run.merged,
        responses / Path(RESPONSES.path).with_suffix(".jsonl").name,
        made,
        from_model=asked.from_model,
        layers=kept_layers(asked, layer_count(run.merged)),
        options=options,
        progress=run.progress,
    )
    publish_folder(made, DRAFT.at(run.folder).parent)


def _speculate(run: RunContext, asked: SpeculateTable, *, drafted: bool) -> Step:
    from lorasmith.followup.speculation.speculate import speculate

    draft = DRAFT.at(run.folder).parent if drafted else None
    options = SpeculateOptions.taken_from(asked, run.config)
    stage = Stage(
        name="speculate",
        inputs={"target": run.merged, "prompts": run.test_set, **({"draft": draft} if draft else {})},
        parameters=options.model_dump(mode="json"),
        outputs=[SPECULATION.path],
        action=lambda: speculate(
            run.merged,
            run.test_set,
            draft=draft,
            output=SPECULATION.at(run.folder),
            options=options,
            progress=run.progress,
        ),
    )
    return Step("Test speculative decoding", stage, (SPECULATION,))


def _compress(run: RunContext, asked: CompressTable) -> list[Step]:
    from lorasmith.runs.compression import compress

    config = run.config
    options = compress_options(asked, config, run.test_set)
    steps = []
    for settings in every_way(asked, config.seed):
        inputs = {"model": run.merged, "test_set": run.test_set}
        if settings.method == "calibrated":
            inputs["calibration"] = config.train[0]
        place = f"{layout.COMPRESSED_MODELS}/{settings.name}"
        stage = Stage(
            name=f"compress-{settings.name}",
            inputs=inputs,
            parameters={
                **vars(settings),
                "limit": asked.limit,
                "limits": limits_of(asked),
                "tasks": config.tasks,
                "device": config.device,
            },
            outputs=[place],
            action=partial(
                compress,
                run.merged,
                run.folder / place,
                options=only_way(options, settings),
                work=run.folder / layout.FOLLOWUP_WORK / "measuring",
                progress=run.progress,
            ),
        )
        title = f"Compress to {settings.format} ({settings.method})"
        steps.append(Step(title, stage, (layout.compressed(settings.name),)))
    return steps
