"""Calibrated rounding, decoder layer by decoder layer: what its linear layers get, then how they are rounded.

The calibration rows go through the adapter model one layer at a time. While they pass, each linear layer's
second moment of inputs is summed, once for layers that get the same tensor; then the layer's weights are
rounded with error feedback (layer_rounding.py) and the rows' hidden states kept for the next layer. Rounded
weights and hidden states are on disk before the next layer begins, so that a killed merge goes on there and
ends with the same bytes. Tensors that cannot be calibrated are dithered, and the reason is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save
from torch import nn

from lorasmith.errors import CheckpointError, InputError, os_errors
from lorasmith.files.atomic import read_record, write_bytes, write_record
from lorasmith.merging.calibration import Calibration
from lorasmith.merging.effective import Effective
from lorasmith.merging.feedback import Feedback
from lorasmith.merging.fitted import Calibrated
from lorasmith.merging.layer_rounding import Linear, round_layer
from lorasmith.merging.moments import Moments
from lorasmith.merging.plan import Plan
from lorasmith.models.arithmetic import choose_route, resolve_device, use_route
from lorasmith.models.layerwise import LayerwiseModel, watched
from lorasmith.progress import Progress
from lorasmith.records.base import Record

OUTSIDE = "not a linear layer of a decoder layer"


class LayerDone(Record):
    """A decoder layer whose rounded weights and next hidden states are on disk."""

    FORMAT: ClassVar[str] = "lorasmith/merge-calibrated-layer/1"

    tensors: list[str]
    fallbacks: dict[str, str]


def run_calibration(
    base: Path,
    plan: Plan,
    effective: Effective,
    rows: Calibration,
    state: Path,
    device: str,
    progress: Progress,
) -> Calibrated:
    """Round every tensor that can be calibrated into files below `state`.

    The arithmetic is float32 by torch's own route, whatever is faster elsewhere: the bytes depend on it.
    Raises `CheckpointError` where the architecture cannot be run layer by layer, and where activations are
    not finite.
    """
    place = resolve_device(device)
    with use_route(choose_route("mkl" if place.type == "cpu" else "auto", place)):
        return _all_layers(base, plan, effective, rows, state, place, progress)


def _all_layers(
    base: Path,
    plan: Plan,
    effective: Effective,
    rows: Calibration,
    state: Path,
    device: torch.device,
    progress: Progress,
) -> Calibrated:
    wanted = {output.name: output for output in plan.outputs if output.change and output.change.rows}
    model = LayerwiseModel(base, effective, device)
    with os_errors(state, "write"):
        state.mkdir(parents=True, exist_ok=True)
    found = Calibrated()
    hidden: list[torch.Tensor] | None = None
    with progress("Calibrate", total=model.count, unit="layer") as advance:
        for number in range(model.count):
            done = _done(state, number)
            if done is None:
                given = _hidden(state, number, model, rows) if hidden is None else hidden
                hidden, done = _one_layer(model, number, effective, rows, given, state, Feedback())
            for name in done.tensors:
                found.files[name] = state / f"layer-{number}.safetensors"
            found.fallbacks.update(done.fallbacks)
            advance(1)
    for name in wanted:
        if name not in found.files:
            found.fallbacks.setdefault(name, OUTSIDE)
    return found


def _done(state: Path, number: int) -> LayerDone | None:
    try:
        return read_record(state / f"layer-{number}.json", LayerDone)
    except InputError:
        return None


def _hidden(state: Path, number: int, model: LayerwiseModel, rows: Calibration) -> list[torch.Tensor]:
    """What layer `number` gets: from the layer before, or from the embeddings."""
    if number == 0:
        return model.embed(rows.rows)
    stored = load_file(state / f"hidden-{number}.safetensors")
    return [stored[str(place)] for place in range(len(rows.rows))]


def _one_layer(
    model: LayerwiseModel,
    number: int,
    effective: Effective,
    rows: Calibration,
    given: list[torch.Tensor],
    state: Path,
    settings: Feedback,
) -> tuple[list[torch.Tensor], LayerDone]:
    with model.layer(number) as layer:
        linear, fallbacks = _linear_layers(layer, f"{model.path}.{number}", effective)
        hidden, moments = _run_rows(model, layer, list(linear), rows, given)
    rounded, impossible = round_layer(linear, moments, effective, settings)
    fallbacks.update(impossible)
    done = LayerDone(tensors=sorted(rounded), fallbacks=fallbacks)
    write_bytes(state / f"layer-{number}.safetensors", save(rounded))
    if number + 1 < model.count:
        kept = {str(place): states.contiguous() for place, states in enumerate(hidden)}
        write_bytes(state / f"hidden-{number + 1}.safetensors", save(kept))
    write_record(state / f"layer-{number}.json", done)
    (state / f"hidden-{number}.safetensors").unlink(missing_ok=True)
    return hidden, done


def _linear_layers(
    layer: nn.Module, path: str, effective: Effective
) -> tuple[dict[str, Linear], dict[str, str]]:
    """The layers to calibrate, and of all other changed tensors of the decoder layer why they are not."""
    from transformers.pytorch_utils import Conv1D

    linear: dict[str, Linear] = {}
    fallbacks: dict[str, str] = {}
    for name, _ in layer.named_parameters():
        output = effective.output(f"{path}.{name}")
        if output is None or output.change is None or not output.change.rows:
            continue
        owner, _, leaf = name.rpartition(".")
        module = layer.get_submodule(owner)
        if leaf != "weight" or not isinstance(module, nn.Linear | Conv1D):
            fallbacks[output.name] = OUTSIDE
        elif output.dtype not in ("BF16", "F16"):
            fallbacks[output.name] = f"stored in {output.dtype}, where nearly nothing is lost"
        else:
            linear[owner] = Linear(output, isinstance(module, Conv1D))
    return linear, fallbacks


def _run_rows(
    model: LayerwiseModel,
    layer: nn.Module,
    paths: Sequence[str],
    rows: Calibration,
    given: list[torch.Tensor],
) -> tuple[list[torch.Tensor], list[Moments]]:
    """The layer's output for each row, and the second moments of its linear layers' inputs."""
    groups: dict[str, Moments] = {}
    # The inputs of one forward, by identity; they are kept so that none is reused for another.
    seen: list[tuple[torch.Tensor, str]] = []

    def watch(path: str, inputs: torch.Tensor) -> None:
        leader = next((first for tensor, first in seen if tensor is inputs), path)
        if leader == path:
            seen.append((inputs, path))
            flat = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
            if path not in groups:
                size = flat.shape[1]
                total = torch.zeros(size, size, dtype=torch.float64, device=flat.device)
                groups[path] = Moments([path], total)
            groups[path].take(flat)
        elif path not in groups[leader].paths:
            groups[leader].paths.append(path)

    hidden = []
    with watched(layer, paths, watch):
        for ids, states in zip(rows.rows, given, strict=True):
            hidden.append(model.advance(ids, states).cpu())
            seen.clear()
            if not bool(hidden[-1].isfinite().all()):
                raise CheckpointError(
                    f"the hidden states behind decoder layer {model.active} are not finite",
                    where=f"calibration row {len(hidden)}",
                    expected="finite activations of the adapter model in float32",
                    remedy="the adapter or its base is damaged: take an earlier checkpoint",
                )
    for group in groups.values():
        group.settle()
    return hidden, list(groups.values())
