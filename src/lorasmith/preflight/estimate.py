"""Time, memory, disk and money of a run, by formulas over its sizes and this machine's measured rates."""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.preflight.sizes import ModelSize, WorkSize
from lorasmith.records.doctor import StageEstimate

EFFICIENCY = 0.75
"""Part of the rate of a bare product that scoring reaches: 330 tokens per core second of SmolLM2-135M, which
is 89 GFLOP/s, where a bare product of the same route gave 110 to 120."""
MERGE_BYTES, PROVE_BYTES, PACK_BYTES = 120e6, 95e6, 150e6
"""Per second and pair of cores, as measured on SmolLM2-135M: 269 MB merged in 2.2 s, proved in 2.8 s and
packed in 1.2 s. Larger tensors go faster: the estimate is on the safe side."""
STATISTICS_SECONDS = 10e-9
"""Of comparing one pair of logits: softmax, divergence and quantiles, about 40 passes over memory."""
START_SECONDS = 8.0
"""Importing the libraries, and the small stages."""
LOAD_BYTES = 500e6
"""Read, cast to float32 and checked, per second."""

FLOAT32 = 4
PROCESS_BYTES = 600_000_000
"""Interpreter and libraries: 480 to 600 MB where a tiny model was scored."""
LOGIT_BYTES = 8 * (64 << 20)
"""What a comparison holds of logits at one time (proving/behaviour_measure)."""
SCORE_BYTES = 300_000_000
"""Activations and logits of one model's batch of 1,024 tokens; larger batches take more."""
MERGE_MEMORY = 800_000_000


@dataclass(frozen=True)
class Rates:
    """Measured on this machine a moment ago."""

    flops: float
    """Float32 operations per second of a product on the device that scores."""
    write_bytes: float
    """Per second to the disk of the run folder, synced."""


def estimate(model: ModelSize, work: WorkSize, rates: Rates) -> list[StageEstimate]:
    """Each stage on its own; memory is the peak of the stage, disk what it leaves behind."""
    weights = FLOAT32 * model.parameters
    scoring = PROCESS_BYTES + weights + SCORE_BYTES
    base, adapter = validate_seconds(model, work, rates), validate_seconds(model, work, rates, adapter=True)
    # The comparison reads the hidden states that the validations left: what it computes anew is the noise
    # floor and the serving type's noise (the adapter twice each, on a few rows), both heads, and statistics.
    floor = 4 * adapter * work.floor_tokens / max(1, work.tokens)
    heads = 2 * 2.0 * model.vocabulary * model.hidden * work.scored / (EFFICIENCY * rates.flops)
    compare = floor + heads + STATISTICS_SECONDS * work.scored * model.vocabulary
    compare += model.base_bytes / LOAD_BYTES
    states = 2 * FLOAT32 * model.hidden * work.scored
    head_bytes = 2 * FLOAT32 * model.vocabulary * model.hidden
    disk_seconds = model.merged_bytes / rates.write_bytes
    per_example = 60 * work.scored
    return [
        StageEstimate(stage="start", seconds=START_SECONDS, memory_bytes=PROCESS_BYTES, disk_bytes=0),
        StageEstimate(stage="validate-base", seconds=base, memory_bytes=scoring, disk_bytes=per_example),
        StageEstimate(
            stage="validate-adapter", seconds=adapter, memory_bytes=scoring, disk_bytes=per_example
        ),
        StageEstimate(
            stage="merge",
            seconds=max(model.merged_bytes / MERGE_BYTES, disk_seconds),
            memory_bytes=MERGE_MEMORY,
            disk_bytes=model.merged_bytes,
        ),
        StageEstimate(
            stage="prove-weights",
            seconds=model.merged_bytes / PROVE_BYTES,
            memory_bytes=MERGE_MEMORY,
            disk_bytes=0,
        ),
        StageEstimate(stage="validate-merged", seconds=base, memory_bytes=scoring, disk_bytes=per_example),
        StageEstimate(
            stage="compare",
            seconds=compare,
            memory_bytes=PROCESS_BYTES + weights + head_bytes + LOGIT_BYTES + SCORE_BYTES,
            disk_bytes=states,
        ),
        StageEstimate(
            stage="package",
            seconds=max(model.merged_bytes / PACK_BYTES, disk_seconds),
            memory_bytes=MERGE_MEMORY,
            # What packing asks for before it starts: incompressible weights take their own size.
            disk_bytes=model.merged_bytes,
        ),
    ]


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
