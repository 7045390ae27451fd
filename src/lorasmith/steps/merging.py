"""The merge, the proof of its weights, and the comparison of what both models do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorasmith
from lorasmith.files.hub import origin_of
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, WeightProof
from lorasmith.stages import Stage
from lorasmith.steps.base import STATES, RunContext, Step, numbered


def merge(run: RunContext) -> Step:
    """Base and adapter into one folder."""
    config = run.config
    options: dict[str, Any] = {
        "precision": config.precision,
        "rounding": config.rounding,
        "seed": config.seed,
    }
    rows = merging_rows(run)
    stage = Stage(
        name="merge",
        inputs={**run.models, **numbered("calibration", rows.get("calibration", ())), **_held_out(rows)},
        parameters={
            **options,
            "template": config.template,
            "calibration_tokens": rows.get("calibration_tokens"),
            **_origin(config.base),
        },
        outputs=["merged"],
        action=lambda: lorasmith.merge(
            config.base,
            config.adapter,
            run.merged,
            executor=None if rows else run.executor,  # what is fitted to rows is merged in one process
            progress=run.progress,
            **options,
            **rows,
        ),
    )
    return Step("Merge LoRA weights", stage, {"merged/lorasmith_merge.json": MergeRecord})


def prove(run: RunContext) -> Step:
    """Every element of the merge against its own recomputation."""
    config = run.config
    stage = Stage(
        name="prove-weights",
        inputs={**run.models, "merged": run.merged},
        parameters={},
        outputs=["proof/weights.json"],
        action=lambda: lorasmith.prove(
            config.base,
            config.adapter,
            run.merged,
            output=run.folder / "proof" / "weights.json",
            progress=run.progress,
        ),
    )
    return Step("Prove the weights", stage, {"proof/weights.json": WeightProof})


def compare(run: RunContext) -> Step:
    """Adapter and merged model, token by token."""
    config, scoring = run.config, run.scoring
    stage = Stage(
        name="compare",
        inputs={**run.models, "merged": run.merged, "test_set": run.test_set},
        parameters={
            **scoring,
            "thresholds": config.behaviour_thresholds,
            **({"generate": config.generate} if config.generate else {}),
        },
        outputs=["proof/behaviour.json"],
        action=lambda: lorasmith.compare(
            config.base,
            config.adapter,
            run.merged,
            run.test_set,
            run.folder / "proof" / "behaviour.json",
            thresholds=config.behaviour_thresholds or None,
            generate=config.generate,
            states=run.folder / STATES,
            executor=run.executor,
            progress=run.progress,
            **scoring,
        ),
    )
    return Step("Compare adapter and merged model", stage, {"proof/behaviour.json": BehaviourProof})


def merging_rows(run: RunContext) -> dict[str, Any]:
    """What a calibrated merge is given: the training files, and the test set that it must not see."""
    config = run.config
    if config.rounding not in ("auto", "calibrated") or not config.train:
        return {}
    own: dict[str, Any] = {"template": config.template, "device": config.device}
    budget = config.calibration_tokens
    return {"calibration": config.train, "calibration_tokens": budget, "test_set": run.test_set, **own}


def _held_out(rows: Mapping[str, Any]) -> dict[str, Path]:
    return {"test_set": rows["test_set"]} if rows else {}


def _origin(base: Path) -> dict[str, str]:
    """Where the merge's record says that the base comes from."""
    origin = origin_of(base)
    return {"base_repository": origin.repository, "base_commit": origin.commit} if origin else {}
