"""What the steps after the release would take: their time as far as it can be told, memory, disk."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from lorasmith.checkpoint.model import Checkpoint, open_checkpoint
from lorasmith.config import RunConfig
from lorasmith.followup.asked import CompressAsked, DraftAsked, RespondAsked, spread_layers
from lorasmith.followup.respond_rows import read_prompts
from lorasmith.followup.sizes import choose_group, shapes_of
from lorasmith.followup.sizes_plan import written_bytes
from lorasmith.preflight.answers import AnswerSize
from lorasmith.preflight.estimate import (
    EFFICIENCY,
    FLOAT32,
    LOAD_BYTES,
    PROCESS_BYTES,
    SCORE_BYTES,
    Rates,
    answer_seconds,
)
from lorasmith.preflight.sizes import ModelSize, model_size
from lorasmith.records.doctor import StageEstimate

CHARACTERS_PER_TOKEN = 3.5
"""Of English text and code; answers are not there yet to be counted."""
TRAINING = 32
"""Bytes a parameter of a draft in training: weights, best weights and two moments in float32, twice while a
checkpoint replaces the last one; the draft itself is small beside that."""
TOGETHER = 16
"""Rows under way at once, as `respond` has them on a processor; a GPU has more."""
CALIBRATED = 8
"""Samples of a step of calibrated compression, auto-round's own number."""
PACKED = 16
"""Bytes of a stored token with one of its likeliest, before compression: ids and log-probabilities."""


def estimate_followup(
    config: RunConfig, base: Checkpoint, model: ModelSize, rates: Rates
) -> list[StageEstimate]:
    """Each step that `[followup]` asks for; rows are read, nothing is loaded. Times are upper ends.

    Responses are taken as long as their limit, because nobody knows how long they get; a draft's training as
    3 forward passes a token (a forward and a backward of twice its cost), over all epochs, and so are the
    steps of calibrated compression; to round to nearest counts as loading and measuring only.
    """
    asked = config.followup
    if asked is None:
        return []
    found, answers = [], AnswerSize(rows=0, tokens=0, written=0, together=1)
    if asked.respond is not None:
        answers = _lengths(config, asked.respond)
        found.append(_respond(asked.respond, model, rates, answers))
    if asked.draft is not None:
        found.append(_draft(asked.draft, model, rates, answers.tokens + answers.written))
    if asked.speculate is not None:
        drafts = len(set(asked.speculate.draft_tokens)) * (2 if asked.draft else 1)
        texts = asked.speculate.limit * (1 + drafts)
        written = texts * asked.speculate.max_new_tokens
        one_by_one = AnswerSize(rows=texts, tokens=0, written=written, together=1)
        found.append(
            StageEstimate(
                stage="speculate",
                seconds=answer_seconds(model, one_by_one, rates),
                memory_bytes=PROCESS_BYTES + 2 * FLOAT32 * model.parameters + SCORE_BYTES,
                disk_bytes=0,
            )
        )
    if asked.compress is not None:
        found += _compress(asked.compress, config, base, model, rates)
    return found


def followup_disk(config: RunConfig, base: Checkpoint, merged: int, done: Collection[str]) -> int:
    """Bytes that the steps still to be done leave behind, at most; `done` names stages."""
    size = model_size(base, None, merged)
    unknown = Rates(flops=1.0, write_bytes=1.0)  # only the disk is asked for
    steps = estimate_followup(config, base, size, unknown)
    return sum(step.disk_bytes for step in steps if step.stage not in done)


def _forward(model: ModelSize) -> float:
    """Operations of a forward pass, a token, output head included."""
    return 2.0 * (model.active + model.vocabulary * model.hidden)


def _lengths(config: RunConfig, asked: RespondAsked) -> AnswerSize:
    """Prompts, guessed from their characters, and answers as long as their limit."""
    data = asked.data or (config.train[0] if config.train else None)
    if data is None or not data.is_file():
        return AnswerSize(rows=0, tokens=0, written=0, together=1)
    rows = read_prompts(data, asked.limit)
    characters = sum(len(turn["content"]) for row in rows for turn in row.messages)
    return AnswerSize(
        rows=len(rows),
        tokens=int(characters / CHARACTERS_PER_TOKEN),
        written=len(rows) * asked.max_new_tokens,
        together=asked.batch_size or TOGETHER,
    )


def _respond(asked: RespondAsked, model: ModelSize, rates: Rates, answers: AnswerSize) -> StageEstimate:
    text = int(CHARACTERS_PER_TOKEN * (answers.tokens + answers.written))
    return StageEstimate(
        stage="respond",
        seconds=answer_seconds(model, answers, rates),
        memory_bytes=PROCESS_BYTES + FLOAT32 * model.parameters + SCORE_BYTES,
        # Rows and their journal, which is there until the output is.
        disk_bytes=2 * (text + answers.written * (1 + asked.top_logprobs) * PACKED // 2),
    )


def draft_parameters(asked: DraftAsked, model: ModelSize) -> int:
    """Of a draft that is cut from the target, or of its base; a quarter for one that is not here yet."""
    if asked.base is not None:
        if not Path(asked.base).is_dir():
            return model.parameters // 4
        return sum(info.elements for info in open_checkpoint(Path(asked.base)).tensors.values())
    kept = asked.kept_layers(model.layers) if asked.layers else spread_layers(model.layers)
    outer = model.parameters - model.active
    return outer + model.active * len(kept or ()) // max(1, model.layers)


def _draft(asked: DraftAsked, model: ModelSize, rates: Rates, tokens: int) -> StageEstimate:
    parameters = draft_parameters(asked, model)
    share = parameters / model.parameters
    return StageEstimate(
        stage="draft",
        seconds=asked.epochs * tokens * 3 * share * _forward(model) / (EFFICIENCY * rates.flops),
        memory_bytes=PROCESS_BYTES + TRAINING * parameters + FLOAT32 * model.parameters,
        disk_bytes=TRAINING * parameters,
    )


def _compress(
    asked: CompressAsked, config: RunConfig, base: Checkpoint, model: ModelSize, rates: Rates
) -> Sequence[StageEstimate]:
    shapes = shapes_of(base)
    found = []
    for settings in asked.settings(seed=config.seed):
        group = settings.group_size or choose_group(shapes) or 32
        calibrated = settings.method == "calibrated"
        tokens = settings.iterations * CALIBRATED * settings.calibration_length if calibrated else 0
        size = written_bytes(shapes, base.tied, settings.format, settings.bits, group)
        found.append(
            StageEstimate(
                stage=f"compress-{settings.name}",
                seconds=3 * model.base_bytes / LOAD_BYTES
                + tokens * 3 * 2.0 * model.active / (EFFICIENCY * rates.flops),
                memory_bytes=PROCESS_BYTES + 2 * FLOAT32 * model.parameters,
                disk_bytes=size,
            )
        )
    return found
