"""`lorasmith_merge.json`: what a merge was made from, and what became of the updates in all."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith import __version__
from lorasmith.files.hub import Origin
from lorasmith.merging.folder import ShardDone
from lorasmith.merging.modes import Mode
from lorasmith.merging.plan import Plan
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.merging import MergeRecord

NO_OP_FRACTION = 0.5
"""From this share of swallowed updates on a merge is called close to a no-op."""


def make_record(
    plan: Plan,
    shards: Sequence[ShardDone],
    *,
    files: list[FileDigest],
    origin: Origin | None,
    base_sha256: str,
    adapter_sha256: list[str],
    weights: list[float],
    precision: str,
    mode: Mode,
) -> MergeRecord:
    """Counts over all tensors, and a warning where the merge is close to a no-op."""
    tensors = [tensor for done in shards for tensor in done.tensors]
    swallowed = sum(tensor.swallowed for tensor in tensors)
    updated = swallowed + sum(tensor.changed for tensor in tensors)
    fraction = swallowed / updated if updated else 0.0
    untouched = [output for output in plan.outputs if output.change is None]
    findings = [*plan.findings, *mode.findings]
    if not updated:
        findings.append(
            Finding(
                severity="warning",
                code="no-op",
                message="the adapter changes nothing: all its updates are zero",
            )
        )
    elif fraction >= NO_OP_FRACTION and mode.rounding == "nearest":
        findings.append(
            Finding(
                severity="warning",
                code="close-to-no-op",
                message=f"rounding swallowed {fraction:.1%} of the updates: they are below half an ulp",
                remedy="merge with --rounding calibrated or dithered, or --precision float16, to keep them",
            )
        )
    return MergeRecord(
        lorasmith_version=__version__,
        base_repository=origin.repository if origin else None,
        base_commit=origin.commit if origin else None,
        base_sha256=base_sha256,
        adapter_sha256=adapter_sha256,
        adapter_weights=weights,
        precision=precision,
        rounding=mode.rounding,
        seed=mode.dither_seed,
        calibration=None if mode.rows is None else mode.rows.use,
        tensors=tensors,
        copied=sum(output.dtype == output.source.dtype for output in untouched),
        cast=sum(output.dtype != output.source.dtype for output in untouched),
        elements_updated=updated,
        elements_swallowed=swallowed,
        swallowed_fraction=fraction,
        untied=plan.untied,
        files=sorted(files, key=lambda file: file.path),
        findings=findings,
    )
