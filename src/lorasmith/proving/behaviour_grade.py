"""Which grade a comparison earns, and the numbers that decide it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorasmith.errors import UsageError
from lorasmith.records.proof import TokenComparison

THRESHOLDS: Mapping[str, float] = {
    "loss_delta": 1e-4,
    "perplexity_delta": 0.01,
    "mean_kl": 1e-4,
    "top1_agreement": 0.995,
    "floor_factor": 2.0,
}
"""`faithful` asks for less than the first three and at least the fourth; `indistinguishable` for a mean KL
within `floor_factor` times the floor."""


def resolve_thresholds(given: Mapping[str, float] | None) -> dict[str, float]:
    """The defaults with the caller's in place; raises `UsageError` for an unknown name."""
    unknown = sorted(set(given or {}) - set(THRESHOLDS))
    if unknown:
        raise UsageError(f"there is no threshold {unknown[0]!r}", expected=" | ".join(THRESHOLDS))
    return {**THRESHOLDS, **(given or {})}


def grade(
    overall: TokenComparison,
    floor: TokenComparison,
    thresholds: Mapping[str, float],
    obstacles: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """`indistinguishable`, `faithful` or `drifted`, with reasons; `obstacles` alone make it `drifted`."""
    factor = thresholds["floor_factor"]
    limit = factor * floor.kl.mean
    within = overall.kl.mean <= limit
    reasons = [
        f"mean KL {overall.kl.mean:.3g} is {'within' if within else 'above'} {factor:g} × the floor "
        f"{floor.kl.mean:.3g}"
    ]
    checks = [
        (
            abs(overall.loss_delta) < thresholds["loss_delta"],
            "|loss Δ|",
            abs(overall.loss_delta),
            "loss_delta",
        ),
        (
            abs(overall.perplexity_delta) < thresholds["perplexity_delta"],
            "|perplexity Δ|",
            abs(overall.perplexity_delta),
            "perplexity_delta",
        ),
        (overall.kl.mean < thresholds["mean_kl"], "mean KL", overall.kl.mean, "mean_kl"),
    ]
    for passed, label, value, name in checks:
        reasons.append(f"{label} {value:.3g} is {'below' if passed else 'not below'} {thresholds[name]:g}")
    agrees = overall.top1_agreement >= thresholds["top1_agreement"]
    reasons.append(
        f"top-1 agreement {100 * overall.top1_agreement:.3f} % is {'at least' if agrees else 'below'} "
        f"{100 * thresholds['top1_agreement']:g} %"
    )
    if obstacles:
        return "drifted", [*obstacles, *reasons]
    if within:
        return "indistinguishable", reasons
    if agrees and all(passed for passed, *_ in checks):
        return "faithful", reasons
    return "drifted", reasons
