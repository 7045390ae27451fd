"""lorasmith: validate a LoRA adapter, merge it, prove the merge, and package model and evidence.

The functions below are imported when they are first used, so that `import lorasmith` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasmith.followup.drafts.draft import train_draft as train_draft
    from lorasmith.followup.responses.respond import respond as respond
    from lorasmith.followup.speculation.speculate import speculate as speculate
    from lorasmith.merging.merge import merge as merge
    from lorasmith.proving.behaviour.compare import compare as compare
    from lorasmith.proving.weights.prove import prove as prove
    from lorasmith.runs.compression import compress as compress
    from lorasmith.runs.pipeline import run as run
    from lorasmith.scoring.validate import validate as validate
    from lorasmith.training.train import train as train

__version__ = "0.1.0"

_PUBLIC = {
    "merge": "lorasmith.merging.merge",
    "validate": "lorasmith.scoring.validate",
    "prove": "lorasmith.proving.weights.prove",
    "compare": "lorasmith.proving.behaviour.compare",
    "run": "lorasmith.runs.pipeline",
    "train": "lorasmith.training.train",
    "respond": "lorasmith.followup.responses.respond",
    "speculate": "lorasmith.followup.speculation.speculate",
    "train_draft": "lorasmith.followup.drafts.draft",
    "compress": "lorasmith.runs.compression",
}

__all__ = [
    "__version__",
    "compare",
    "compress",
    "merge",
    "prove",
    "respond",
    "run",
    "speculate",
    "train",
    "train_draft",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lorasmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
