"""Both proofs, and the three models side by side: exact weights, behaviour that drifted a little."""

from __future__ import annotations

import math
from pathlib import Path

from lorasmith.files.atomic import write_record
from lorasmith.records.base import FileDigest, Interval
from lorasmith.records.dataset import Example
from lorasmith.records.proof import (
    BehaviourProof,
    ComparisonRecord,
    Divergence,
    ExampleComparison,
    Flip,
    GenerationComparison,
    KLStatistics,
    PairedEffect,
    TensorProof,
    TokenComparison,
    WeightProof,
)
from tests.samples.rows import sha
from tests.samples.validations import SETTINGS, Losses, grouped, identity, metrics


def comparison(a: list[list[float]], b: list[list[float]], scale: float) -> TokenComparison:
    left, right = metrics(a), metrics(b)
    delta = right.loss - left.loss
    return TokenComparison(
        examples=left.examples,
        tokens=left.tokens,
        loss_a=left.loss,
        loss_b=right.loss,
        loss_delta=delta,
        loss_delta_interval=Interval(low=delta - 2e-4, high=delta + 2e-4),
        perplexity_a=left.perplexity,
        perplexity_b=right.perplexity,
        perplexity_delta=right.perplexity - left.perplexity,
        kl=KLStatistics(
            mean=6.8e-4 * scale,
            standard_error=2.1e-5 * scale,
            median=1.2e-4 * scale,
            q90=1.9e-3 * scale,
            q95=3.0e-3 * scale,
            q99=8.1e-3 * scale,
            q999=2.4e-2 * scale,
            max=5.3e-2 * scale,
        ),
        delta_p_mean=-1e-5 * scale,
        delta_p_rms=4e-3 * scale,
        top1_agreement=1 - 8.7e-3 * min(1.0, scale),
        max_abs_delta=0.21 * scale,
    )


def write_proof(run: Path, rows: list[Example], test_set: FileDigest, losses: Losses) -> None:
    """`proof/`: exact weights, behaviour that drifted a little."""
    adapter, merged = losses["adapter"], losses["merged"]
    pairs = list(zip(adapter, merged, strict=True))
    write_record(
        run / "proof" / "weights.json",
        WeightProof(
            grade="exact",
            rounding="nearest",
            bound_ulps=0,
            base_sha256=sha("base"),
            adapter_sha256=[sha("adapter")],
            merged_sha256=sha("merged"),
            tensors_checked=272,
            elements_checked=134_515_008,
            adapter_tensors_used=84,
            adapter_tensors_total=84,
            tensors=[TensorProof(name="model.norm.weight", kind="copied", elements=576, wrong=0, max_ulps=0)],
            differences=[],
        ),
    )
    write_record(
        run / "proof" / "behaviour.json",
        BehaviourProof(
            grade="drifted",
            reasons=["mean KL 6.8e-04 ≥ 1e-04", "top-1 agreement 99.13 % < 99.5 %"],
            thresholds={
                "loss_delta": 1e-4,
                "perplexity_delta": 0.01,
                "mean_kl": 1e-4,
                "top1_agreement": 0.995,
            },
            a=identity("adapter"),
            b=identity("merged"),
            test_set=test_set,
            settings=SETTINGS,
            overall=comparison(adapter, merged, 1.0),
            groups={
                kind: {
                    name: comparison([a for a, _ in group], [b for _, b in group], 0.5 + 0.3 * index)
                    for index, (name, group) in enumerate(members.items())
                }
                for kind, members in grouped(rows, pairs).items()
            },
            floor=comparison(adapter, adapter, 1e-7),
            flips=[
                Flip(example=row.id, position=0, token_a=271, token_b=198, margin=0.01 * (index + 1))
                for index, row in enumerate(rows[:10])
            ],
            generation=GenerationComparison(
                max_new_tokens=64,
                examples=len(rows),
                same=len(rows) - 2,
                same_fraction=(len(rows) - 2) / len(rows),
                unfinished_a=1,
                unfinished_b=1,
                tokens_before_divergence=41.5,
                divergences=[
                    Divergence(
                        id=row.id, position=3, text_a=row.response, text_b=f"other than {row.response}"
                    )
                    for row in rows[:2]
                ],
                floor_same=4,
                floor_examples=4,
            ),
            examples=[
                ExampleComparison(
                    id=row.id,
                    tokens=len(a),
                    loss_delta=sum(b) / len(b) - sum(a) / len(a),
                    mean_kl=1e-5 * (index + 1),
                    max_abs_delta=1e-3,
                    flips=1 if index < 10 else 0,
                )
                for index, (row, (a, b)) in enumerate(zip(rows, pairs, strict=True))
            ],
        ),
    )
    write_record(
        run / "proof" / "comparison.json",
        ComparisonRecord(
            adapter_effect=effect(losses["base"], adapter),
            adapter_effect_groups={
                kind: {
                    name: effect([a for a, _ in group], [b for _, b in group])
                    for name, group in members.items()
                }
                for kind, members in grouped(rows, list(zip(losses["base"], adapter, strict=True))).items()
            },
            merge_effect=effect(adapter, merged),
            weights_grade="exact",
            behaviour_grade="drifted",
        ),
    )


def effect(a: list[list[float]], b: list[list[float]]) -> PairedEffect:
    left, right = metrics(a), metrics(b)
    delta, half = right.loss - left.loss, 0.4 / math.sqrt(len(a))
    verdict = "helps" if delta + half < 0 else "hurts" if delta - half > 0 else "no clear effect"
    return PairedEffect(
        examples=left.examples,
        loss_a=left.loss,
        loss_b=right.loss,
        loss_delta=delta,
        perplexity_delta=right.perplexity - left.perplexity,
        interval=Interval(low=delta - half, high=delta + half),
        verdict=verdict,
    )
