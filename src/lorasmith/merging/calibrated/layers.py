"""Decoder layer after decoder layer, each on disk before the next begins: what all calibrations share.

The calibration rows go through the model one layer at a time, in float32 by torch's own route, whatever is
faster elsewhere: the bytes depend on it. A layer's fitted tensors, and the hidden states that the next one
gets, are written before the record that says so. So a merge that was killed goes on with the layer it was in,
and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save
from torch import nn

from lorasmith.errors import CheckpointError, InputError, os_errors
from lorasmith.files.atomic import read_record, write_bytes, write_record
from lorasmith.merging.calibrated.feedback import Curvature, Feedback, SingularError, prepare_curvature
from lorasmith.merging.calibrated.rows import AdaptedWeights
from lorasmith.merging.plan import Output, Plan
from lorasmith.merging.writers import CalibratedTensors
from lorasmith.models.device import choose_route, resolve_device, use_route
from lorasmith.models.layerwise import LayerwiseModel
from lorasmith.progress import Progress
from lorasmith.records.base import Record

LEAST_TOKENS = 0.25
"""Tokens per input that a second moment needs. With fewer it says too little of unseen rows to be worth the
departure from an unbiased rounding."""
OUTSIDE = "not a linear layer of a decoder layer"

Counts = tuple[int, int, float, float]
"""Codes that differ from the base's, elements with an update, ‖W‖² and ‖ΔW‖² of one weight."""


class LayerDone(Record):
    """A decoder layer whose fitted tensors and next hidden states are on disk."""

    FORMAT: ClassVar[str] = "lorasmith/merge-calibrated-layer/2"

    tensors: list[str]
    fallbacks: dict[str, str]
    """The reasons why others were not calibrated, by name."""
    counts: dict[str, Counts]
    """Those of weights on a quantized grid."""


def calibrate_layers(
    base: Path,
    plan: Plan,
    weights: AdaptedWeights,
    state: Path,
    device: str,
    progress: Progress,
    one_layer: Callable[[LayerwiseModel, int], LayerDone],
) -> CalibratedTensors:
    """Run `one_layer` for each layer that is not done; what all of them have fitted, in files below `state`.

    Raises `CheckpointError` where the architecture cannot be run layer by layer.
    """
    place = resolve_device(device)
    outcome = CalibratedTensors()
    with use_route(choose_route("mkl" if place.type == "cpu" else "auto", place)):
        model = LayerwiseModel(base, weights, place)
        with os_errors(state, "write"):
            state.mkdir(parents=True, exist_ok=True)
        with progress("Calibrate", total=model.count, unit="layer") as advance:
            for number in range(model.count):
                done = _done(state, number) or one_layer(model, number)
                for name in done.tensors:
                    outcome.files[name] = state / f"layer-{number}.safetensors"
                outcome.fallbacks.update(done.fallbacks)
                outcome.counts.update(done.counts)
                advance(1)
    for output in plan.outputs:
        if output.change and output.change.updates and output.name not in outcome.files:
            outcome.fallbacks.setdefault(output.name, OUTSIDE)
    return outcome


def _done(state: Path, number: int) -> LayerDone | None:
    try:
        return read_record(state / f"layer-{number}.json", LayerDone)
    except InputError:
        return None


def stored_hidden(state: Path, number: int) -> dict[str, torch.Tensor]:
    """What `finish_layer` has kept for a layer."""
    return load_file(state / f"hidden-{number}.safetensors")


def finish_layer(
    state: Path,
    number: int,
    tensors: Mapping[str, torch.Tensor],
    hidden: Mapping[str, torch.Tensor],
    fallbacks: Mapping[str, str],
    counts: Mapping[str, Counts] | None = None,
) -> LayerDone:
    """Write a layer's tensors, and the hidden states [T, H] of the next one; empty behind the last."""
    done = LayerDone(tensors=sorted(tensors), fallbacks=dict(fallbacks), counts=dict(counts or {}))
    # In this order: the record is what a merge that was killed goes on from, so all it stands for is there.
    write_bytes(state / f"layer-{number}.safetensors", save(dict(tensors)))
    if hidden:
        kept = {name: one.contiguous() for name, one in hidden.items()}
        write_bytes(state / f"hidden-{number + 1}.safetensors", save(kept))
    write_record(state / f"layer-{number}.json", done)
    (state / f"hidden-{number}.safetensors").unlink(missing_ok=True)
    return done


def changed_weights(
    layer: nn.Module, path: str, weights: AdaptedWeights
) -> Iterator[tuple[str, nn.Module | None, Output]]:
    """The tensors of a decoder layer that the adapter changes: the owner's path and the module below `layer`.

    No module is given where the tensor is not one's `weight`.
    """
    for name, _ in layer.named_parameters():
        output = weights.output(f"{path}.{name}")
        if output is not None and output.change is not None and output.change.updates:
            owner, _, leaf = name.rpartition(".")
            yield owner, layer.get_submodule(owner) if leaf == "weight" else None, output


def find_curvature(total: torch.Tensor, tokens: int, settings: Feedback) -> Curvature | str:
    """The curvature from Σ x·xᵀ [I, I] over some tokens, or why there is none."""
    inputs = len(total)
    if tokens < LEAST_TOKENS * inputs:
        return f"{tokens} tokens are too few for {inputs} inputs"
    try:
        return prepare_curvature(total.cpu() / tokens, settings)
    except SingularError as error:
        return str(error)


def require_finite(hidden: torch.Tensor, model: LayerwiseModel, row: int) -> None:
    """`CheckpointError` for hidden states behind the layer in turn that are not finite."""
    if not bool(hidden.isfinite().all()):
        raise CheckpointError(
            f"the hidden states behind decoder layer {model.active} are not finite",
            where=f"calibration row {row + 1}",
            expected="finite activations of the adapter model in float32",
            remedy="the adapter or its base is damaged: take an earlier checkpoint",
        )
