"""Which rounding a merge ends up with, and what it needs for it: a seed, rows, a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.data.sources import local_rows
from lorasmith.errors import UsageError
from lorasmith.merging.calibrated.feedback import Feedback
from lorasmith.merging.calibrated.fit import run_calibration
from lorasmith.merging.calibrated.onto_grid import run_onto_grid
from lorasmith.merging.calibrated.rows import AdaptedWeights, Calibration, load_calibration
from lorasmith.merging.plan import Plan
from lorasmith.merging.writers import CalibratedTensors
from lorasmith.models.device import resolve_device
from lorasmith.models.layerwise import UnsupportedLayers
from lorasmith.options import MergeOptions
from lorasmith.progress import Progress
from lorasmith.records.base import Finding

FITTED_TYPES = ("BF16", "F16")
"""The types that are worth a fit: to float32 next to nothing is lost."""


@dataclass
class Mode:
    """The rounding of one merge; `rounding` is final once `fit` is done."""

    asked: str
    rounding: str
    seed: int
    device: str
    rows: Calibration | None = None
    onto_grid: bool = False
    """Whether it goes back onto the grid of a quantized base."""
    calibrated: CalibratedTensors | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def dither_seed(self) -> int | None:
        """The seed of what is dithered; None where all is rounded to nearest."""
        return None if self.rounding == "nearest" else self.seed

    @property
    def key(self) -> list[Any]:
        """Everything of it that the merged bytes depend on."""
        if self.rows is None:
            return [self.asked, self.dither_seed]
        # Activations of other versions or devices differ in their last bits, and with them what is fitted.
        versions = [version(name) for name in ("torch", "transformers")]
        device = resolve_device(self.device).type
        key = [self.asked, self.seed, self.rows.rows, device, asdict(Feedback()), versions]
        return [*key, "onto its grid"] if self.onto_grid else key

    def refuse_calibrated(self) -> None:
        """Raise `UsageError` for a rounding that is fitted to rows, layer after layer, in one process."""
        if self.rows is not None:
            raise UsageError(
                "a calibrated merge runs in one process: each layer's fit needs what the merged layers "
                "before it give",
                expected="--rounding nearest or dithered on a cluster",
                remedy="leave --executor ray out, or give another rounding",
            )

    def fit(
        self, base: Checkpoint, adapters: Sequence[Adapter], plan: Plan, scratch: Path, progress: Progress
    ) -> None:
        """Fit what can be; under `auto`, a model that cannot be run layer by layer is rounded to nearest."""
        if self.rows is None:
            return
        weights = AdaptedWeights(base, adapters, plan)
        try:
            if self.onto_grid:
                self.calibrated = run_onto_grid(
                    base, plan, weights, self.rows, scratch, self.device, progress
                )
            else:
                self.calibrated = run_calibration(
                    base.folder, plan, weights, self.rows, scratch, self.device, progress
                )
        except UnsupportedLayers as error:
            # Whoever asked for `calibrated` is not given another rounding; `auto` may choose.
            if self.asked != "auto":
                raise
            self.rounding, self.rows = "nearest", None
            self.findings.append(
                Finding(
                    severity="warning",
                    code="not-calibrated",
                    message=f"rounded to nearest, as {error.found}",
                    remedy=error.remedy,
                )
            )


def choose_mode(options: MergeOptions, plan: Plan, base: Path, adapters: Sequence[Path]) -> Mode:
    """Read the rows where they are needed.

    `auto` is calibrated where rows are given and 16-bit tensors change, else nearest; it leaves rows of the
    test set out, which `calibrated` refuses. Raises `UsageError` for calibrated rounding without rows.
    """
    asked = options.rounding
    files = tuple(local_rows(file, options) for file in options.calibration)
    test_set = None if options.test_set is None else local_rows(options.test_set, options)
    fitted = any(one.change and one.change.updates and one.dtype in FITTED_TYPES for one in plan.outputs)
    if asked not in ("calibrated", "auto") or (asked == "auto" and not (files and fitted)):
        return Mode(asked, "nearest" if asked == "auto" else asked, options.seed, options.device)
    if not files:
        raise UsageError(
            "calibrated rounding needs rows to calibrate on",
            expected="--calibration FILE",
            remedy="give the training file, or --rounding dithered, which needs no data",
        )
    rows = load_calibration(
        files,
        base,
        adapters,
        budget=options.calibration_tokens,
        test_set=test_set,
        leave_out=asked == "auto",
        wording=options,
        seed=options.seed,
    )
    return Mode(asked, "calibrated", options.seed, options.device, rows, onto_grid=options.into == "base")
