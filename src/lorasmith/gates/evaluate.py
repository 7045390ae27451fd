"""Each gate with its measured value and verdict."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping

from lorasmith.errors import UsageError
from lorasmith.files.run_layout import RunRecords
from lorasmith.gates.metrics import METRICS, NotMeasured
from lorasmith.records.release import Gate, GateRecord, GateResult

# What to do about a gate that did not pass and has no advice of its own, by what it measures.


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
    advice = next((text for start, text in ADVICE.items() if gate.metric.startswith(start)), "")
    return gate.model_copy(update={"advice": advice})


_COMPARE: Mapping[str, Callable[..., bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def evaluate(gates: Iterable[Gate], records: RunRecords) -> GateRecord:
    """Each gate with its measured value, interval and verdict, and with advice (see `gates.advice`).

    Raises `UsageError` for a metric or a kind of group that does not exist, or a threshold of the wrong type.
    """
    return GateRecord.of(_evaluate(gate, records) for gate in gates)


def check_gates(gates: Iterable[Gate]) -> None:
    """Raise what `evaluate` would raise, before there is anything to measure."""
    for gate in gates:
        METRICS[_known(gate)].check(gate)


def split_costs(gates: Iterable[Gate]) -> tuple[list[Gate], list[Gate]]:
    """Gates on what was found, and gates on what it cost.

    Costs change from run to run: their verdicts must not stand in records that are equal between runs.
    """
    known = list(gates)
    costs = [gate for gate in known if gate.metric.startswith("cost.")]
    return [gate for gate in known if gate not in costs], costs


def _evaluate(gate: Gate, records: RunRecords) -> GateResult:
    metric = METRICS[_known(gate)]
    metric.check(gate)
    gate = with_advice(gate)
    try:
        value, interval = metric.read(records, gate.group)
    except NotMeasured as missing:
        return GateResult(gate=gate, measured=None, verdict="not measured", reason=str(missing))
    passed = _COMPARE[gate.comparison](value, gate.threshold)
    return GateResult(gate=gate, measured=value, interval=interval, verdict="pass" if passed else "fail")


def _known(gate: Gate) -> str:
    if gate.metric not in METRICS:
        raise UsageError(
            f"gate {gate.name!r} names a metric that does not exist: {gate.metric!r}",
            expected=f"one of {', '.join(METRICS)}",
        )
    return gate.metric


# The success criteria of a release: generalisation of the adapter, and fidelity of the merge.


GUIDE_GATES: tuple[Gate, ...] = (
    Gate(name="loss", metric="adapter.loss", threshold=0.10, advice=RETRAIN),
    Gate(name="perplexity", metric="adapter.perplexity", threshold=2.0, advice=RETRAIN),
    Gate(
        name="easy perplexity",
        metric="adapter.perplexity",
        group="difficulty=easy",
        threshold=1.5,
        advice=RETRAIN,
    ),
    Gate(
        name="hard perplexity",
        metric="adapter.perplexity",
        group="difficulty=hard",
        threshold=3.0,
        advice=RETRAIN,
    ),
    Gate(name="merge loss Δ", metric="merge.loss_delta", threshold=1e-4, advice=REMERGE),
    Gate(name="merge perplexity Δ", metric="merge.perplexity_delta", threshold=0.01, advice=REMERGE),
    Gate(
        name="same outputs",
        metric="merge.top1_agreement",
        comparison=">=",
        threshold=1.0,
        advice=REMERGE,
    ),
    Gate(
        name="weights",
        metric="weights.grade",
        comparison="!=",
        threshold="different",
        advice=MERGED_ANEW,
    ),
)
"""The default gates, in the order of the procedure. `same outputs`: after every prefix of every response,
adapter and merged model prefer the same next token."""
