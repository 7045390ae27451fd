"""What a quantized base is merged into, and the plan for the tensors that are written then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import CheckpointError, UsageError
from lorasmith.merging.onto_grid import keep_format
from lorasmith.merging.plan import Plan, plan_merge
from lorasmith.quantized.open import formats


@dataclass(frozen=True)
class PlannedMerge:
    """What is written, and what the adapter model itself looks like."""

    own: Plan
    """The plan for the model's own tensors, whatever they are stored as."""
    written: Plan
    """The plan for the tensors of the output's files."""
    source: Checkpoint
    """The base with the tensors that `written` names."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are written."""
        return sum(output.nbytes for output in self.written.outputs)


def plan_into(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], precision: str, into: str
) -> PlannedMerge:
    """Plan a merge into 16 bits or, for `base`, into the base's own format; raises as `plan_merge` does."""
    own = plan_merge(base, adapters, weights, precision)
    if into != "base":
        return PlannedMerge(own, own, base)
    source, written = keep_format(own, base)
    return PlannedMerge(own, written, source)


def choose_into(base: Checkpoint, adapters: Sequence[Adapter], into: str | None, precision: str) -> str:
    """`into` where it goes with the base, which nobody but its user can know; empty for a base in 16 bits.

    Raises `UsageError` where it is missing or out of place.
    """
    if not base.decoded:
        if into is not None:
            raise UsageError(
                f"--into {into} is for a quantized base, and this one is not",
                where=base.folder,
                remedy="leave --into out; --precision chooses the type of the merged tensors",
            )
        return ""
    if into is None:
        named = sorted({adapter.config.base_model for adapter in adapters if adapter.config.base_model})
        known = f"; the adapter was trained on {', '.join(named)}" if named else ""
        raise UsageError(
            f"the base is quantized: {formats(base)}{known}",
            where=base.folder,
            expected="--into 16bit or --into base",
            remedy="--into 16bit dequantizes it and merges exactly: what an adapter that was trained on this "
            "base (QLoRA) was trained as, in 16 bits a weight. --into base goes back onto the base's own "
            "grid: its size and its loader; --rounding calibrated keeps the update there, nearest next to "
            "nothing of it. The 16-bit model "
            "that it was quantized from is another base than the one that such an adapter was trained on",
        )
    if into == "base":
        if precision != "base":
            raise UsageError(
                f"--precision {precision} and --into base contradict each other",
                expected="--precision base: every tensor keeps its type",
            )
    elif not (base.folder / "config.json").exists():
        raise CheckpointError(
            "there is no config.json beside the GGUF file, which a model in 16 bits needs",
            where=base.folder,
            expected="config.json and the tokenizer's files of the model",
            remedy="put them beside it (they are those of the model that it was made from), or merge with "
            "--into base",
        )
    return into
