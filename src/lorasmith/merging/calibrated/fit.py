"""Calibrated rounding, decoder layer by decoder layer: what its linear layers get, then how they are rounded.

While the calibration rows pass through a layer of the adapter model, each linear layer's second moment of
inputs is summed, once for layers that get the same tensor; then the layer's weights are rounded with error
feedback. Tensors that cannot be calibrated are dithered, and the reason is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lorasmith.merging.calibrated.feedback import Curvature, Feedback, round_with_feedback
from lorasmith.merging.calibrated.layers import (
    OUTSIDE,
    LayerDone,
    calibrate_layers,
    changed_weights,
    find_curvature,
    finish_layer,
    require_finite,
    stored_hidden,
)
from lorasmith.merging.calibrated.rows import AdaptedWeights, Calibration
from lorasmith.merging.numbers.rounding import TARGETS
from lorasmith.merging.numbers.threads import Workers
from lorasmith.merging.plan import Output, Plan
from lorasmith.merging.writers import CalibratedTensors
from lorasmith.models.layerwise import LayerwiseModel, watched
from lorasmith.progress import Progress

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

    def curvature_of(group: SecondMoments) -> Curvature | str:
        return find_curvature(group.total, group.tokens, settings)

    with Workers() as workers:
        curvatures = (
            workers.map(lambda group: find_curvature(group.total, group.tokens, settings), moments)
            if moments
            else []
        )
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

    Raises `CheckpointError` where the architecture cannot be run layer by layer, and where activations are
    not finite.
    """
    hidden: list[torch.Tensor] | None = None

    def one_layer(model: LayerwiseModel, number: int) -> LayerDone:
        nonlocal hidden
        given = _hidden(state, number, model, rows) if hidden is None else hidden
        hidden, done = _one_layer(model, number, weights, rows, given, state, Feedback())
        return done

    return calibrate_layers(base, plan, weights, state, device, progress, one_layer)


def _hidden(state: Path, number: int, model: LayerwiseModel, rows: Calibration) -> list[torch.Tensor]:
    """What layer `number` gets: from the layer before, or from the embeddings."""
    if number == 0:
        return model.embed(rows.rows)
    stored = stored_hidden(state, number)
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
    kept = {str(place): states for place, states in enumerate(hidden)} if number + 1 < model.count else {}
    return hidden, finish_layer(state, number, rounded, kept, fallbacks | impossible)


def _linear_layers(
    layer: nn.Module, path: str, weights: AdaptedWeights
) -> tuple[dict[str, Linear], dict[str, str]]:
    """The layers to calibrate, and of all other changed tensors of the decoder layer why they are not."""
    from transformers.pytorch_utils import Conv1D

    linear: dict[str, Linear] = {}
    fallbacks: dict[str, str] = {}
    for owner, module, output in changed_weights(layer, path, weights):
        if not isinstance(module, nn.Linear | Conv1D):
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
            require_finite(hidden[-1], model, len(hidden) - 1)
    for group in groups.values():
        group.settle()
    return hidden, list(groups.values())
