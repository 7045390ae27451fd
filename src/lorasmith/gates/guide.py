"""The success criteria of a release: generalisation of the adapter, and fidelity of the merge."""

from __future__ import annotations

from lorasmith.records.release import Gate

_RETRAIN = (
    "the adapter may have overfit its training data: train again with more regularisation (fewer epochs, "
    "lower rank, more dropout), or accept it if the hard examples are diverse"
)
_REMERGE = (
    "check that the versions of torch, transformers and peft are those of the training; then merge again "
    "with another rounding (give --train, and it is calibrated on those rows; or --rounding dithered) or at "
    "higher precision (--precision float16 or float32)"
)

GUIDE_GATES: tuple[Gate, ...] = (
    Gate(name="loss", metric="adapter.loss", threshold=0.10, advice=_RETRAIN),
    Gate(name="perplexity", metric="adapter.perplexity", threshold=2.0, advice=_RETRAIN),
    Gate(
        name="easy perplexity",
        metric="adapter.perplexity",
        group="difficulty=easy",
        threshold=1.5,
        advice=_RETRAIN,
    ),
    Gate(
        name="hard perplexity",
        metric="adapter.perplexity",
        group="difficulty=hard",
        threshold=3.0,
        advice=_RETRAIN,
    ),
    Gate(name="merge loss Δ", metric="merge.loss_delta", threshold=1e-4, advice=_REMERGE),
    Gate(name="merge perplexity Δ", metric="merge.perplexity_delta", threshold=0.01, advice=_REMERGE),
    Gate(
        name="same outputs",
        metric="merge.top1_agreement",
        comparison=">=",
        threshold=1.0,
        advice=_REMERGE,
    ),
    Gate(
        name="weights",
        metric="weights.grade",
        comparison="!=",
        threshold="different",
        advice="the merged folder is not this merge: look at the first differences, then merge again",
    ),
)
"""In the order of the procedure. `same outputs`: after every prefix of every response, adapter and merged
model prefer the same next token."""
