"""The success criteria of a release: generalisation of the adapter, and fidelity of the merge."""

from __future__ import annotations

from lorasmith.gates.advice import MERGED_ANEW, REMERGE, RETRAIN
from lorasmith.records.release import Gate

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
"""In the order of the procedure. `same outputs`: after every prefix of every response, adapter and merged
model prefer the same next token."""
