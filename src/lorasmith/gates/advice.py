"""What to do about a gate that did not pass and has no advice of its own, by what it measures."""

from __future__ import annotations

from lorasmith.records.release import Gate

RETRAIN = (
    "the adapter may have overfit its training data: train again with more regularisation (fewer epochs, "
    "lower rank, more dropout), or accept it if the hard examples are diverse"
)
REMERGE = (
    "check that the versions of torch, transformers and peft are those of the training; then merge again "
    "with another rounding (give --train, and it is calibrated on those rows; or --rounding dithered) or at "
    "higher precision (--precision float16 or float32)"
)
MERGED_ANEW = "the merged folder is not this merge: look at the first differences, then merge again"
_SWALLOWED = (
    "rounding lost these updates: merge again with another rounding (give --train, or --rounding dithered) "
    "or at higher precision (--precision float16 or float32)"
)
_NO_GAIN = (
    "the adapter does no better here than its base: look at the groups it fails in, train longer or on more "
    "of such examples, or ask for less"
)
_BASE = "this is the base without its adapter: check that base, chat template and test set are the right ones"
_EXAMPLES = "score more examples: testset build --samples-per-benchmark, or testset split --test-size"
_CONTAMINATED = (
    "take the rows that testset/contamination.json names out of the test set or out of the training data "
    "(testset check --drop does the former), then validate again"
)
_COST = (
    "take a cheaper machine, a smaller test set (--test-size, --samples-per-benchmark) or larger batches; "
    "`lorasmith doctor` estimates a run before it starts"
)
_MEMORY = "give smaller batches (--batch-tokens 512, or --batch-size 2)"

ADVICE: dict[str, str] = {
    "cost.peak_memory_bytes": _MEMORY,
    "cost.": _COST,
    "contamination.": _CONTAMINATED,
    "weights.bound_ulps": _SWALLOWED,
    "weights.": MERGED_ANEW,
    "behaviour.": REMERGE,
    "merge.swallowed_fraction": _SWALLOWED,
    "merge.": REMERGE,
    "merged.examples": _EXAMPLES,
    "merged.": REMERGE,
    "effect.": _NO_GAIN,
    "adapter.examples": _EXAMPLES,
    "adapter.": RETRAIN,
    "base.examples": _EXAMPLES,
    "base.": _BASE,
}
"""Beginning of a metric's name → what to do; the first that fits."""


def with_advice(gate: Gate) -> Gate:
    """The gate with the advice of its metric where it has none of its own."""
    if gate.advice:
        return gate
    found = next((text for start, text in ADVICE.items() if gate.metric.startswith(start)), "")
    return gate.model_copy(update={"advice": found})
