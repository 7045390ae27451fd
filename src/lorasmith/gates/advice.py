"""What to do about a gate that did not pass and has no advice of its own: by its metric and by the run.

Advice looks at what was done already: a merge that is calibrated is not told to calibrate, and an adapter
that is level with its base is not called overfit.
"""

from __future__ import annotations

from collections.abc import Callable

from lorasmith.files.run_layout import RunRecords

_VERSIONS = "check that the versions of torch, transformers and peft are those of the training"
_MERGED_ANEW = "the merged folder is not this merge: look at the first differences, then merge again"
_NO_GAIN = (
    "the adapter does no better here than its base: look at the groups it fails in, train longer or on more "
    "of such examples, or ask for less"
)
_BASE = "this is the base without its adapter: check that base, chat template and test set are the right ones"
_EXAMPLES = "score more examples: testset build --samples-per-benchmark, or testset split --size"
_CONTAMINATED = (
    "take the rows that `testset check` shows out of the test set (its --drop does) or out of the training "
    "data, then validate again"
)
_COST = (
    "take a cheaper machine, larger batches or a smaller test set (testset split --size, or testset build "
    "--samples-per-benchmark); `lorasmith doctor` estimates a run before it starts"
)
_MEMORY = "give smaller batches (--batch-tokens 512, or --batch-size 2)"


def _roundings_left(records: RunRecords) -> str:
    """How the merge could lose less to rounding than it did; empty where it rounds in float32 already."""
    merge = records.merge
    if merge is None:
        return "merge again with another rounding, or at higher precision (--precision float16 or float32)"
    if merge.precision == "float32":
        return ""
    higher = "float32" if merge.precision == "float16" else "float16 or float32"
    precision = f"at higher precision (--precision {higher})"
    if merge.rounding == "calibrated":
        return f"the rounding is calibrated already: merge again {precision}"
    calibrated = "give --train, and it is calibrated on those rows"
    if records.contamination is not None and records.contamination.verdict != "not checked":
        calibrated = "--rounding calibrated, on the rows of --train"
    dithered = "" if merge.rounding == "dithered" else "; or --rounding dithered"
    return f"merge again with another rounding ({calibrated}{dithered}) or {precision}"


def _remerge(records: RunRecords) -> str:
    left = _roundings_left(records)
    if not left:
        return f"{_VERSIONS}; the merge is in float32, so that rounding is not what makes the difference"
    return f"{_VERSIONS}; then {left}"


def _swallowed(records: RunRecords) -> str:
    left = _roundings_left(records) or "the merge is in float32 already: these updates are too small for it"
    return f"rounding lost these updates: {left}"


def _retrain(records: RunRecords) -> str:
    """About an adapter's losses: what they say depends on what its base has on the same rows."""
    effect = records.comparison.adapter_effect if records.comparison else None
    if effect is not None and effect.verdict == "no clear effect":
        return (
            "adapter and base are level here: check that this is the adapter and the base it was trained on, "
            "and that the test set asks for what it learned; else train longer or on more of such examples"
        )
    if effect is not None and effect.verdict == "helps":
        return (
            "the adapter helps, but not as far as this: train longer or on more rows, try another learning "
            "rate, or set a threshold that fits these rows"
        )
    return (
        "the adapter may have overfit its training data: train again with more regularisation (fewer epochs, "
        "lower rank, more dropout), or accept it if the hard examples are diverse"
    )


def _always(text: str) -> Callable[[RunRecords], str]:
    return lambda records: text


ADVICE: dict[str, Callable[[RunRecords], str]] = {
    "cost.peak_memory_bytes": _always(_MEMORY),
    "cost.": _always(_COST),
    "contamination.": _always(_CONTAMINATED),
    "weights.bound_ulps": _swallowed,
    "weights.": _always(_MERGED_ANEW),
    "behaviour.": _remerge,
    "merge.swallowed_fraction": _swallowed,
    "merge.": _remerge,
    "merged.examples": _always(_EXAMPLES),
    "merged.": _remerge,
    "effect.": _always(_NO_GAIN),
    "adapter.examples": _always(_EXAMPLES),
    "adapter.": _retrain,
    "base.examples": _always(_EXAMPLES),
    "base.": _always(_BASE),
}
"""Beginning of a metric's name → what to do about it in a run; the first that fits."""


def advise(metric: str, records: RunRecords) -> str:
    """What to do where a gate on this metric does not pass; empty for a metric that has no advice."""
    return next((advice(records) for start, advice in ADVICE.items() if metric.startswith(start)), "")
