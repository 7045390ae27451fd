"""Time, memory, disk and money of a run, by formulas over its sizes and this machine's measured rates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.checkpoint.model import Checkpoint, open_checkpoint
from lorasmith.followup.compression.settings import every_way
from lorasmith.followup.compression.sizes import choose_group, shapes_of, written_bytes
from lorasmith.followup.drafts.layers import kept_layers
from lorasmith.followup.responses.rows import read_prompts
from lorasmith.options import CompressTable, DraftTable, RespondTable, RunOptions
from lorasmith.preflight.sizes import AnswerSize, CalibrationSize, ModelSize, WorkSize, model_size
from lorasmith.records.doctor import StageEstimate

EFFICIENCY = 0.5
"""Part of the rate of the probe's product that scoring reaches: SmolLM2-135M, whose products are 576 to 1,536
wide, was scored at 96 GFLOP/s where the probe found 219; wider models come closer to it."""
MERGE_WORK, PROVE_WORK, BOUND_WORK = 1.5, 1.5, 10.0
"""How often a merge, its proof, and the proof that an element lies within its bound do the work of the
rounding probe: on SmolLM2-135M they took 1.2, 1.3 and 14.7 processor seconds."""
FEEDBACK = 0.13
"""The same for rounding with feedback, which goes column by column: the rest of the 48 s that SmolLM2-135M
took with 6,144 tokens. Matrices of 576 to 1,536 columns alone reach 0.25 to 0.44 of a thread's products."""
STATISTICS_SECONDS = 10e-9
"""Cost of comparing one pair of logits: softmax, divergence and quantiles, some 40 passes over memory."""
START_SECONDS = 8.0
"""Time to import the libraries, and of the small stages."""
LOAD_BYTES = 500e6
"""Bytes of weights that are read, cast to float32 and checked, per second."""

FLOAT32 = 4
PROCESS_BYTES = 600_000_000
"""Memory of interpreter and libraries: 480 to 600 MB where a tiny model was scored."""
LOGIT_BYTES = 8 * (64 << 20)
"""What a comparison holds of logits at one time (proving/behaviour/measure.py)."""
SCORE_BYTES = 300_000_000
"""Activations and logits of one model's batch of 1,024 tokens; larger batches take more."""
MERGE_MEMORY = 800_000_000
KEPT_TOKENS = 512
"""Tokens that are kept of each row being answered. Its keys and values together are taken to be as wide as
the hidden state, as where two queries share one key."""


@dataclass(frozen=True)
class Rates:
    """How fast this machine is, as measured a moment ago."""

    flops: float
    """Float32 operations per second of a product on the device that scores."""
    write_bytes: float
    """Bytes per second to the disk of the run folder, synced."""
    read_bytes: float = 8e9
    """Bytes per second from the memory of the device that scores."""
    round_bytes: float = 250e6
    """Bytes of bfloat16 weights that get a low-rank update in float64 and are rounded, per second."""
    pack_bytes: float = 200e6
    """Bytes of bfloat16 weights that are hashed and compressed, per second."""


def estimate(
    model: ModelSize,
    work: WorkSize,
    rates: Rates,
    *,
    calibration: CalibrationSize | None = None,
    answers: AnswerSize | None = None,
) -> list[StageEstimate]:
    """Each stage on its own; memory is the peak of the stage, disk what it leaves behind.

    With `calibration` the merge is fitted to rows; with `answers` all three models answer questions.
    """
    weights = FLOAT32 * model.parameters
    scoring = PROCESS_BYTES + weights + SCORE_BYTES
    base, adapter = validate_seconds(model, work, rates), validate_seconds(model, work, rates, adapter=True)
    head_bytes = 2 * FLOAT32 * model.vocabulary * model.hidden
    per_example = 60 * work.scored

    def stage(name: str, seconds: float, memory: int, disk: int = 0) -> StageEstimate:
        return StageEstimate(stage=name, seconds=seconds, memory_bytes=memory, disk_bytes=disk)

    def ask(role: str) -> list[StageEstimate]:
        if answers is None:
            return []
        # Keys and values of the rows at hand: a few hundred tokens each, of grouped queries.
        memory = scoring + FLOAT32 * model.layers * model.hidden * answers.together * KEPT_TOKENS
        return [stage(f"tasks-{role}", answer_seconds(model, answers, rates), memory)]

    return [
        stage("start", START_SECONDS, PROCESS_BYTES),
        stage("validate-base", base, scoring, per_example),
        *ask("base"),
        stage("validate-adapter", adapter, scoring, per_example),
        *ask("adapter"),
        stage(
            "merge",
            merge_seconds(model, rates, calibration),
            MERGE_MEMORY + (calibration_memory(model, calibration) if calibration else 0),
            model.merged_bytes,
        ),
        stage("prove-weights", prove_seconds(model, rates, calibration), MERGE_MEMORY),
        stage("validate-merged", base, scoring, per_example),
        *ask("merged"),
        stage(
            "compare",
            compare_seconds(model, work, rates),
            PROCESS_BYTES + weights + head_bytes + LOGIT_BYTES + SCORE_BYTES,
            2 * FLOAT32 * model.hidden * work.scored,
        ),
        stage(
            "package",
            model.merged_bytes / min(rates.pack_bytes, rates.write_bytes),
            MERGE_MEMORY,
            # What packing asks for before it starts: incompressible weights take their own size.
            model.merged_bytes,
        ),
    ]


def merge_seconds(model: ModelSize, rates: Rates, calibration: CalibrationSize | None = None) -> float:
    """Every element once, no faster than the disk takes them; before that, what is fitted to rows.

    The fitted part: the rows through the layers, the second moments, their inverses in float64 (half the
    rate), and the columns with feedback, in float32.
    """
    plain = model.merged_bytes / min(rates.round_bytes / MERGE_WORK, rates.write_bytes)
    if calibration is None:
        return plain
    forward = 2.0 * model.active * calibration.tokens
    forward += 2.0 * model.layers * model.hidden * calibration.squares
    products = forward / EFFICIENCY + calibration.moments + 2 * calibration.factors
    products += calibration.feedback / FEEDBACK
    return plain + model.base_bytes / LOAD_BYTES + products / rates.flops


def prove_seconds(model: ModelSize, rates: Rates, calibration: CalibrationSize | None = None) -> float:
    """Every element once; what was fitted to rows is held against a bound, which takes longer."""
    fitted = 2 * calibration.elements if calibration else 0
    return (PROVE_WORK * model.merged_bytes + BOUND_WORK * fitted) / rates.round_bytes


def calibration_memory(model: ModelSize, calibration: CalibrationSize) -> int:
    """Beside a plain merge: the rows' hidden states twice, and one layer's weights and inputs in float64."""
    layer = calibration.elements // max(1, model.layers)
    return 2 * FLOAT32 * calibration.tokens * model.hidden + 6 * 8 * layer + model.base_bytes


def compare_seconds(model: ModelSize, work: WorkSize, rates: Rates) -> float:
    """The hidden states are there from the validations: what is computed anew is the noise floor and the
    serving type's noise (the adapter once each, on a few rows), both heads, and statistics.
    """
    adapter = validate_seconds(model, work, rates, adapter=True)
    floor = 2 * adapter * work.floor_tokens / max(1, work.tokens)
    heads = 2 * 2.0 * model.vocabulary * model.hidden * work.scored / (EFFICIENCY * rates.flops)
    statistics = STATISTICS_SECONDS * work.scored * model.vocabulary
    return floor + heads + statistics + model.base_bytes / LOAD_BYTES


def answer_seconds(model: ModelSize, answers: AnswerSize, rates: Rates) -> float:
    """Questions at the rate of scoring; answers step by step: the weights are read or multiplied, whichever
    takes longer. An upper end: every answer is taken to be as long as its limit.
    """
    token = 2.0 * (model.active + model.vocabulary * model.hidden) / (EFFICIENCY * rates.flops)
    step = max(FLOAT32 * model.parameters / rates.read_bytes, answers.together * token)
    questions = answers.tokens * 2.0 * model.active / (EFFICIENCY * rates.flops)
    return questions + answers.written / answers.together * step + model.base_bytes / LOAD_BYTES


def validate_seconds(model: ModelSize, work: WorkSize, rates: Rates, *, adapter: bool = False) -> float:
    """One model over the test set.

    2 operations per active parameter and token (Kaplan et al. 2020, section 2.1), 2·layers·hidden·length² for
    causal attention, 2·vocabulary·hidden per scored token for the output head.
    """
    parameters = model.active + (model.adapter_parameters if adapter else 0)
    flops = 2.0 * parameters * work.tokens
    flops += 2.0 * model.layers * model.hidden * work.squares
    flops += 2.0 * model.vocabulary * model.hidden * work.scored
    return flops / (EFFICIENCY * rates.flops) + model.base_bytes / LOAD_BYTES


def least_memory(model: ModelSize) -> int:
    """Below this nothing can be scored: one model in float32, and nothing else."""
    return FLOAT32 * model.parameters


# What the steps after the release would take: their time as far as it can be told, memory, disk.


CHARACTERS_PER_TOKEN = 3.5
"""Characters of English text or code in a token; answers are not there yet to be counted."""
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
    config: RunOptions, base: Checkpoint, model: ModelSize, rates: Rates
) -> list[StageEstimate]:
    """Each step that `[followup]` asks for; rows are read, nothing is loaded. Times are upper ends.

    Responses are taken as long as their limit, because nobody knows how long they get; a draft's training as
    3 forward passes a token (a forward and a backward of twice its cost), over all epochs, and so are the
    steps of calibrated compression; to round to nearest counts as loading and measuring only.
    """
    asked = config.followup
    if asked is None:
        return []
    stages, answers = [], AnswerSize(rows=0, tokens=0, written=0, together=1)
    if asked.respond is not None:
        answers = _lengths(config, asked.respond)
        stages.append(_respond(asked.respond, model, rates, answers))
    if asked.draft is not None:
        stages.append(_draft(asked.draft, model, rates, answers.tokens + answers.written))
    if asked.speculate is not None:
        drafts = len(set(asked.speculate.draft_tokens)) * (2 if asked.draft else 1)
        texts = asked.speculate.limit * (1 + drafts)
        written = texts * asked.speculate.max_new_tokens
        one_by_one = AnswerSize(rows=texts, tokens=0, written=written, together=1)
        stages.append(
            StageEstimate(
                stage="speculate",
                seconds=answer_seconds(model, one_by_one, rates),
                memory_bytes=PROCESS_BYTES + 2 * FLOAT32 * model.parameters + SCORE_BYTES,
                disk_bytes=0,
            )
        )
    if asked.compress is not None:
        stages += _compress(asked.compress, config, base, model, rates)
    return stages


def followup_disk(config: RunOptions, base: Checkpoint, merged: int, done: Collection[str]) -> int:
    """Bytes that the steps still to be done leave behind, at most; `done` names stages."""
    size = model_size(base, None, merged)
    unknown = Rates(flops=1.0, write_bytes=1.0)  # only the disk is asked for
    steps = estimate_followup(config, base, size, unknown)
    return sum(step.disk_bytes for step in steps if step.stage not in done)


def _forward(model: ModelSize) -> float:
    """Operations of a forward pass, a token, output head included."""
    return 2.0 * (model.active + model.vocabulary * model.hidden)


def _lengths(config: RunOptions, asked: RespondTable) -> AnswerSize:
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


def _respond(asked: RespondTable, model: ModelSize, rates: Rates, answers: AnswerSize) -> StageEstimate:
    text = int(CHARACTERS_PER_TOKEN * (answers.tokens + answers.written))
    return StageEstimate(
        stage="respond",
        seconds=answer_seconds(model, answers, rates),
        memory_bytes=PROCESS_BYTES + FLOAT32 * model.parameters + SCORE_BYTES,
        # Rows and their journal, which is there until the output is.
        disk_bytes=2 * (text + answers.written * (1 + asked.top_logprobs) * PACKED // 2),
    )


def draft_parameters(asked: DraftTable, model: ModelSize) -> int:
    """Size of a draft that is cut from the target, or of its model; a quarter where that is not here."""
    if asked.from_model is not None:
        if not Path(asked.from_model).is_dir():
            return model.parameters // 4
        return sum(info.elements for info in open_checkpoint(Path(asked.from_model)).tensors.values())
    kept = kept_layers(asked, model.layers)
    outer = model.parameters - model.active
    return outer + model.active * len(kept or ()) // max(1, model.layers)


def _draft(asked: DraftTable, model: ModelSize, rates: Rates, tokens: int) -> StageEstimate:
    parameters = draft_parameters(asked, model)
    share = parameters / model.parameters
    return StageEstimate(
        stage="draft",
        seconds=asked.epochs * tokens * 3 * share * _forward(model) / (EFFICIENCY * rates.flops),
        memory_bytes=PROCESS_BYTES + TRAINING * parameters + FLOAT32 * model.parameters,
        disk_bytes=TRAINING * parameters,
    )


def _compress(
    asked: CompressTable, config: RunOptions, base: Checkpoint, model: ModelSize, rates: Rates
) -> Sequence[StageEstimate]:
    shapes = shapes_of(base)
    stages = []
    for settings in every_way(asked, config.seed):
        group = settings.group_size or choose_group(shapes) or 32
        calibrated = settings.method == "calibrated"
        tokens = settings.iterations * CALIBRATED * settings.calibration_length if calibrated else 0
        size = written_bytes(shapes, base.tied, settings.format, settings.bits, group)
        stages.append(
            StageEstimate(
                stage=f"compress-{settings.name}",
                seconds=3 * model.base_bytes / LOAD_BYTES
                + tokens * 3 * 2.0 * model.active / (EFFICIENCY * rates.flops),
                memory_bytes=PROCESS_BYTES + 2 * FLOAT32 * model.parameters,
                disk_bytes=size,
            )
        )
    return stages
