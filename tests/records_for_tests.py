"""Complete small records, for tests of what reads them."""

from __future__ import annotations

from typing import Any

from lorasmith.records.base import FileDigest, Interval
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, KLStatistics, TokenComparison, WeightProof
from lorasmith.records.scoring import GroupMetrics, ModelIdentity, ScoringSettings, ValidationResult

FILE = FileDigest(path="test_set.jsonl", bytes=10, sha256="0" * 64)
SETTINGS = ScoringSettings(
    template="chat", max_length=256, arithmetic="float32", device="cpu", batch_tokens=1024
)


def identity(role: str) -> ModelIdentity:
    return ModelIdentity(role=role, model_sha256="1" * 64, architecture="LlamaForCausalLM", parameters=10)


def metrics(loss: float, perplexity: float) -> GroupMetrics:
    return GroupMetrics(
        examples=5, tokens=50, loss=loss, perplexity=perplexity, interval=Interval(low=loss, high=loss)
    )


def validation(role: str, loss: float = 0.05, perplexity: float = 1.05, **groups: Any) -> ValidationResult:
    return ValidationResult(
        model=identity(role),
        test_set=FILE,
        settings=SETTINGS,
        overall=metrics(loss, perplexity),
        groups=groups,
        per_example=FILE,
    )


def comparison(
    loss_delta: float = 1e-6, perplexity_delta: float = 1e-6, kl: float = 1e-6, top1: float = 0.99
) -> TokenComparison:
    return TokenComparison(
        examples=5,
        tokens=50,
        loss_a=0.05,
        loss_b=0.05 + loss_delta,
        loss_delta=loss_delta,
        perplexity_a=1.05,
        perplexity_b=1.05 + perplexity_delta,
        perplexity_delta=perplexity_delta,
        kl=KLStatistics(
            mean=kl, standard_error=kl, median=kl, q90=kl, q95=kl, q99=kl, q999=2 * kl, max=3 * kl
        ),
        delta_p_mean=0.0,
        delta_p_rms=0.0,
        top1_agreement=top1,
        max_abs_delta=0.01,
    )


def behaviour(overall: TokenComparison | None = None, grade: str = "faithful") -> BehaviourProof:
    return BehaviourProof(
        grade=grade,
        reasons=[],
        thresholds={},
        a=identity("adapter"),
        b=identity("merged"),
        test_set=FILE,
        settings=SETTINGS,
        overall=overall or comparison(),
        groups={},
        floor=None,
        flips=[],
    )


def weights(grade: str = "exact") -> WeightProof:
    return WeightProof(
        grade=grade,
        rounding="nearest",
        bound_ulps=0,
        base_sha256="1" * 64,
        adapter_sha256=["2" * 64],
        merged_sha256="3" * 64,
        tensors_checked=2,
        elements_checked=20,
        adapter_tensors_used=2,
        adapter_tensors_total=2,
        tensors=[],
        differences=[],
    )


def merge(swallowed: float = 0.5) -> MergeRecord:
    return MergeRecord(
        lorasmith_version="0",
        base_sha256="1" * 64,
        adapter_sha256=["2" * 64],
        adapter_weights=[1.0],
        precision="base",
        rounding="nearest",
        tensors=[],
        copied=1,
        cast=0,
        elements_updated=10,
        elements_swallowed=5,
        swallowed_fraction=swallowed,
        files=[],
    )
