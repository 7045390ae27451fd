"""Calibrated rounding, decoder layer by decoder layer: what its linear layers get, then how they are rounded.

The calibration rows go through the adapter model one layer at a time. While they pass, each linear layer's
second moment of inputs is summed, once for layers that get the same tensor; then the layer's weights are
rounded with error feedback and the rows' hidden states kept for the next layer. Rounded
weights and hidden states are on disk before the next layer begins, so that a killed merge goes on there and
ends with the same bytes. Tensors that cannot be calibrated are dithered, and the reason is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save
from torch import nn

from lorasmith.errors import CheckpointError, InputError, os_errors
from lorasmith.files.atomic import read_record, write_bytes, write_record
from lorasmith.merging.calibrated.feedback import (
    Curvature,
    Feedback,
    SingularError,
    prepare_curvature,
    round_with_feedback,
)
from lorasmith.merging.calibrated.rows import AdaptedWeights, Calibration
from lorasmith.merging.numbers.rounding import TARGETS
from lorasmith.merging.numbers.threads import Workers
from lorasmith.merging.plan import Output, Plan
from lorasmith.merging.writers import CalibratedTensors
from lorasmith.models.device import choose_route, resolve_device, use_route
from lorasmith.models.layerwise import LayerwiseModel, watched
from lorasmith.progress import Progress
from lorasmith.records.base import Record

# Second moments of what linear layers get: Σ x·xᵀ over the tokens of all calibration rows, in float64.


_TOGETHER = 2_048
"""Tokens whose products are summed in float32 before they join the float64 total."""


@dataclass
class SecondMoments:
    """Σ x·xᵀ of the layers that share an input of I numbers."""

    paths: list[str]
    total: torch.Tensor
    """[I, I] float64; complete once `settle` was called."""
    tokens: int = 0
    waiting: list[torch.Tensor] = field(default_factory=list)
    """Inputs [T, I] float32 that are not in `total` yet: one large product is cheaper than many small."""

    def take(self, inputs: torch.Tensor) -> None:
        """Add the inputs [T, I] of a row, sooner or later."""
        self.waiting.append(inputs)
        self.tokens += len(inputs)
        if sum(len(part) for part in self.waiting) >= _TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Bring everything that waits into `total`."""
        if self.waiting:
            rows = torch.cat(self.waiting)
            self.total += rows.T @ rows
            self.waiting.clear()


# The linear layers of one decoder layer, rounded with error feedback: rows of matrices in threads.
#
# Layers that get the same input share its second moment, and their rows lie in one stack: the columns are
# gone through once for all of them. A stack is cut into the same parts whatever the number of threads, and
# each part is one thread's: the bytes do not depend on how many there are.


LEAST_TOKENS = 0.25
"""Tokens per input that a second moment needs. With fewer it says too little of unseen rows to be worth the
departure from an unbiased rounding."""
MOST_ROWS = 2_048
"""Rows of a part. A column of it is some numbers per operation: with fewer, calling the operations would cost
more than they do; with more, a block would leave the cache."""


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight the adapter changes."""

    output: Output
    transposed: bool
    """GPT-2 stores [I, O]."""


@dataclass(frozen=True)
class _Stack:
    """Layers with one input and one type."""

    layers: Sequence[Linear]
    values: torch.Tensor
    """[O, I] float32: exact before, rounded after."""
    base: torch.Tensor
    """[O, I] float32: before the merge."""
    curvature: Curvature

    def parts(self) -> list[tuple[_Stack, int, int]]:
        """Ranges of rows of about the same size."""
        rows = len(self.values)
        count = -(-rows // MOST_ROWS)
        edges = [rows * part // count for part in range(count + 1)]
        return [(self, edges[part], edges[part + 1]) for part in range(count)]


def round_layer(
    linear: Mapping[str, Linear],
    moments: Sequence[SecondMoments],
    weights: AdaptedWeights,
    settings: Feedback,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The rounded tensors by name, and why others could not be; `linear` is by the paths in `moments`."""
    reached = {path for group in moments for path in group.paths}
    why = {layer.output.name: "got no tokens" for path, layer in linear.items() if path not in reached}
    stacks: list[_Stack] = []
    with Workers() as workers:
        curvatures = workers.map(lambda group: _curvature(group, settings), moments) if moments else []
        for group, curvature in zip(moments, curvatures, strict=True):
            layers = [linear[path] for path in group.paths]
            if isinstance(curvature, str):
                why.update({layer.output.name: curvature for layer in layers})
            else:
                stacks += _stacks(layers, weights, curvature)
        parts = [part for stack in stacks for part in stack.parts()]
        # The longest first, so that no thread is left with it at the end.
        parts.sort(key=lambda part: (part[2] - part[1]) * part[0].values.shape[1] ** 2, reverse=True)
        if parts:
            workers.map(lambda part: _round(*part, settings), parts)
    return {name: tensor for stack in stacks for name, tensor in _apart(stack)}, why


def _curvature(group: SecondMoments, settings: Feedback) -> Curvature | str:
    """The curvature of a group of layers, or why there is none."""
    inputs = len(group.total)
    if group.tokens < LEAST_TOKENS * inputs:
        return f"{group.tokens} tokens are too few for {inputs} inputs"
    try:
        return prepare_curvature(group.total.cpu() / group.tokens, settings)
    except SingularError as error:
        return str(error)


def _stacks(layers: Sequence[Linear], weights: AdaptedWeights, curvature: Curvature) -> list[_Stack]:
    stacks = []
    for dtype in sorted({layer.output.dtype for layer in layers}):
        here = [layer for layer in layers if layer.output.dtype == dtype]
        values = _rows(here, [weights.values(layer.output) for layer in here])
        base = _rows(here, [weights.before(layer.output) for layer in here])
        stacks.append(_Stack(here, values, base, curvature))
    return stacks


def _rows(layers: Sequence[Linear], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    turned = [one.T if layer.transposed else one for layer, one in zip(layers, tensors, strict=True)]
    return torch.cat(turned)


def _round(stack: _Stack, first: int, last: int, settings: Feedback) -> None:
    # Inference mode is the caller's thread's alone.
    with torch.inference_mode():
        rows = stack.values[first:last]
        exact, target = rows.to(torch.float64), TARGETS[stack.layers[0].output.dtype]
        update = exact - stack.base[first:last]
        rows.copy_(round_with_feedback(exact, update, stack.curvature, target, settings))


def _apart(stack: _Stack) -> list[tuple[str, torch.Tensor]]:
    """Each layer's own tensor as it is stored."""
    tensors: list[tuple[str, torch.Tensor]] = []
    start = 0
    for layer in stack.layers:
        shape = layer.output.shape
        rows = stack.values[start : start + shape[-1 if layer.transposed else 0]]
        start += len(rows)
        stored = (rows.T if layer.transposed else rows).to(TARGETS[layer.output.dtype].native)
        tensors.append((layer.output.name, stored.contiguous()))
    return tensors


OUTSIDE = "not a linear layer of a decoder layer"


class LayerDone(Record):
    """A decoder layer whose rounded weights and next hidden states are on disk."""

    FORMAT: ClassVar[str] = "lorasmith/merge-calibrated-layer/1"

    tensors: list[str]
    fallbacks: dict[str, str]


def run_calibration(
    base: Path,
    plan: Plan,
    weights: AdaptedWeights,
    rows: Calibration,
    state: Path,
    device: str,
    progress: Progress,
) -> CalibratedTensors:
    """Round every tensor that can be calibrated into files below `state`.

    The arithmetic is float32 by torch's own route, whatever is faster elsewhere: the bytes depend on it.
    Raises `CheckpointError` where the architecture cannot be run layer by layer, and where activations are
    not finite.
    """
    place = resolve_device(device)
    with use_route(choose_route("mkl" if place.type == "cpu" else "auto", place)):
        return _all_layers(base, plan, weights, rows, state, place, progress)


def _all_layers(
    base: Path,
    plan: Plan,
    weights: AdaptedWeights,
    rows: Calibration,
    state: Path,
    device: torch.device,
    progress: Progress,
) -> CalibratedTensors:
    wanted = {output.name: output for output in plan.outputs if output.change and output.change.updates}
    model = LayerwiseModel(base, weights, device)
    with os_errors(state, "write"):
        state.mkdir(parents=True, exist_ok=True)
    outcome = CalibratedTensors()
    hidden: list[torch.Tensor] | None = None
    with progress("Calibrate", total=model.count, unit="layer") as advance:
        for number in range(model.count):
            done = _done(state, number)
            if done is None:
                given = _hidden(state, number, model, rows) if hidden is None else hidden
                hidden, done = _one_layer(model, number, weights, rows, given, state, Feedback())
            for name in done.tensors:
                outcome.files[name] = state / f"layer-{number}.safetensors"
            outcome.fallbacks.update(done.fallbacks)
            advance(1)
    for name in wanted:
        if name not in outcome.files:
            outcome.fallbacks.setdefault(name, OUTSIDE)
    return outcome


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
    weights: AdaptedWeights,
    rows: Calibration,
    given: list[torch.Tensor],
    state: Path,
    settings: Feedback,
) -> tuple[list[torch.Tensor], LayerDone]:
    with model.layer(number) as layer:
        linear, fallbacks = _linear_layers(layer, f"{model.path}.{number}", weights)
        hidden, moments = _run_rows(model, layer, list(linear), rows, given)
    rounded, impossible = round_layer(linear, moments, weights, settings)
    fallbacks.update(impossible)
    done = LayerDone(tensors=sorted(rounded), fallbacks=fallbacks)
    # In this order: the record is what a merge that was killed goes on from, so all it stands for is there.
    write_bytes(state / f"layer-{number}.safetensors", save(rounded))
    if number + 1 < model.count:
        kept = {str(place): states.contiguous() for place, states in enumerate(hidden)}
        write_bytes(state / f"hidden-{number + 1}.safetensors", save(kept))
    write_record(state / f"layer-{number}.json", done)
    (state / f"hidden-{number}.safetensors").unlink(missing_ok=True)
    return hidden, done


def _linear_layers(
    layer: nn.Module, path: str, weights: AdaptedWeights
) -> tuple[dict[str, Linear], dict[str, str]]:
    """The layers to calibrate, and of all other changed tensors of the decoder layer why they are not."""
    from transformers.pytorch_utils import Conv1D

    linear: dict[str, Linear] = {}
    fallbacks: dict[str, str] = {}
    for name, _ in layer.named_parameters():
        output = weights.output(f"{path}.{name}")
        if output is None or output.change is None or not output.change.updates:
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
) -> tuple[list[torch.Tensor], list[SecondMoments]]:
    """The layer's output for each row, and the second moments of its linear layers' inputs."""
    groups: dict[str, SecondMoments] = {}
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
                groups[path] = SecondMoments([path], total)
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
