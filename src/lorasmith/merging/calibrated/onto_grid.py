"""Calibrated rounding onto the grid of a quantized base, decoder layer by decoder layer.

A 4-bit grid is so coarse that rounding to nearest gives the base back, and that what error feedback leaves in
one layer is felt in the next ones. So two models run side by side over the calibration rows: the adapter on
its base, which is the model that is meant, and the model that comes about, whose earlier layers are on the
grid already. A linear layer W with inputs x of the first and z of the second is fitted to

    T = W' + (α·W'·Σ(x − z)·zᵀ + ρ·Σ r·zᵀ)·(Σ z·zᵀ + λI)⁻¹,    W' = W + Δ,

the matrix that gives with z nearer to what W' gives with x, and makes up for a part of r, the difference of
the two residual streams that the layer's output is added to. T is rounded with the error feedback of
`feedback.py` in the metric Σ z·zᵀ. α = ρ = ½ and λ = 0.3 of the mean diagonal lost least on unseen rows:
whole shares follow the calibration rows too closely (docs/quantized-merge.md). Matching outputs rather than
weights is the idea of GPTAQ (arXiv 2504.02692) and QEP (arXiv 2504.09629), which correct quantized models;
here it keeps a merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lorasmith.checkpoint.model import Checkpoint
from lorasmith.merging.calibrated.feedback import Curvature, Feedback, fit_to_grid
from lorasmith.merging.calibrated.layers import (
    OUTSIDE,
    Counts,
    LayerDone,
    calibrate_layers,
    changed_weights,
    find_curvature,
    finish_layer,
    require_finite,
    stored_hidden,
)
from lorasmith.merging.calibrated.rows import AdaptedWeights, Calibration
from lorasmith.merging.numbers.threads import Workers
from lorasmith.merging.plan import Output, Plan
from lorasmith.merging.writers import CalibratedTensors
from lorasmith.models.layerwise import LayerwiseModel
from lorasmith.progress import Progress
from lorasmith.quantized.grid import Block
from lorasmith.quantized.open import DecodedTensor
from lorasmith.quantized.weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARE_OF_INPUTS = 0.5
"""α: how much of what the inputs differ by is made up for."""
SHARE_OF_RESIDUAL = 0.5
"""ρ: how much of the difference of the residual streams is made up for."""
CORRECTION_DAMPING = 0.3
"""λ of the corrections over the mean of the second moment's diagonal."""
SMALL_GRID = 16
"""Points of a 4-bit grid."""
MOST_STEPS_SMALL, MOST_STEPS = 2, 15
"""How far from its own rounding an element may go on a small grid and on others, in grid points. That
rounding is taken from float32 here, so the proof allows one step more."""
_PART_ROWS = 2_048
MOST_KEPT = 1 << 30
"""Bytes of what a layer's linear layers get in the adapter model; rows beyond are computed anew for each."""


@dataclass(frozen=True)
class LevelGrid:
    """level · scale + offset, with the levels of a format: columns [I, O] in the order of a curvature."""

    points: torch.Tensor
    """Levels in ascending order, float32."""
    middles: torch.Tensor
    scale: torch.Tensor
    inverse: torch.Tensor
    """0 where the scale is."""
    offset: torch.Tensor | None
    low: torch.Tensor
    """The lowest level of each element."""
    high: torch.Tensor

    @classmethod
    def around(cls, columns: torch.Tensor, block: Block, order: torch.Tensor) -> LevelGrid:
        """The grid of some rows, up to some points from the rounding of exact values [I, O]."""

        def turned(array: Any) -> torch.Tensor:
            whole = torch.from_numpy(np.array(np.broadcast_to(array, block.codes.shape)))
            return whole.to(torch.float32)[:, order].T.contiguous()

        points = torch.from_numpy(block.levels.points).float()
        scale = turned(block.steps)
        unlimited = cls(
            points,
            torch.from_numpy(block.levels.middles).float(),
            scale,
            torch.where(scale != 0, 1 / scale, 0.0),
            None if block.offset is None else turned(block.offset),
            points[:1],
            points[-1:],
        )
        limit = MOST_STEPS_SMALL if len(points) <= SMALL_GRID else MOST_STEPS
        own = unlimited.places(columns)
        low, high = (own - limit).clamp(min=0), (own + limit).clamp(max=len(points) - 1)
        return replace(unlimited, low=points[low], high=points[high])

    def places(self, values: torch.Tensor) -> torch.Tensor:
        """Where among the points the levels nearest to float32 values [I, O] are."""
        levels = (values if self.offset is None else values - self.offset) * self.inverse
        return torch.bucketize(levels, self.middles)

    def nearest(self, values: torch.Tensor, column: int) -> torch.Tensor:
        """The nearest level's number, within each element's limits."""
        if self.offset is not None:
            values.sub_(self.offset[column])
        levels = values.mul_(self.inverse[column]).clamp_(self.low[column], self.high[column])
        near = self.points[torch.bucketize(levels, self.middles)].mul_(self.scale[column])
        return near if self.offset is None else near.add_(self.offset[column])


def run_onto_grid(
    base: Checkpoint,
    plan: Plan,
    weights: AdaptedWeights,
    rows: Calibration,
    state: Path,
    device: str,
    progress: Progress,
) -> CalibratedTensors:
    """The codes of every weight that can be calibrated, in files below `state`.

    `plan` is that of the model's own tensors, not of the stored ones. Raises as `fit.run_calibration` does.
    """
    streams: _Streams | None = None

    def one_layer(model: LayerwiseModel, number: int) -> LayerDone:
        nonlocal streams
        streams = streams or _stored_streams(state, number, model, rows)
        return _one_layer(model, number, weights, rows, streams, state)

    return calibrate_layers(base.folder, plan, weights, state, device, progress, one_layer)


@dataclass
class _Streams:
    """The hidden states of each row in both models: the adapter on its base, and the merge."""

    meant: list[torch.Tensor]
    made: list[torch.Tensor]


def _stored_streams(state: Path, number: int, model: LayerwiseModel, rows: Calibration) -> _Streams:
    if number == 0:
        embedded = model.embed(rows.rows)
        return _Streams(embedded, [one.clone() for one in embedded])
    stored = stored_hidden(state, number)
    count = range(len(rows.rows))
    return _Streams([stored[f"meant {n}"] for n in count], [stored[f"made {n}"] for n in count])


@dataclass
class _Linear:
    """A linear layer on its way to the grid."""

    path: str
    module: nn.Linear
    output: Output
    weight: QuantizedWeight
    meant: torch.Tensor
    """W + Δ, [O, I] float32: what the module of the adapter model holds."""
    made: torch.Tensor
    """What the merge holds: W + Δ until it is rounded."""


def _one_layer(
    model: LayerwiseModel,
    number: int,
    weights: AdaptedWeights,
    rows: Calibration,
    streams: _Streams,
    state: Path,
) -> LayerDone:
    codes: dict[str, torch.Tensor] = {}
    counts: dict[str, Counts] = {}
    with model.layer(number) as layer:
        linear, fallbacks = _linear_layers(layer, f"{model.path}.{number}", weights)
        pair = _Pair(model, layer, list(linear.values()), rows, streams)
        for group in pair.groups():
            reason = _fit_group(pair, group, weights, codes, counts)
            fallbacks.update({one.output.name: reason for one in group if reason})
        reached = {one.output.name for one in pair.reached}
        fallbacks.update(
            {one.output.name: "got no tokens" for one in linear.values() if one.output.name not in reached}
        )
        pair.advance()
    kept: dict[str, torch.Tensor] = {}
    if number + 1 < model.count:
        kept |= {f"meant {n}": one for n, one in enumerate(streams.meant)}
        kept |= {f"made {n}": one for n, one in enumerate(streams.made)}
    return finish_layer(state, number, codes, kept, fallbacks, counts)


def _linear_layers(
    layer: nn.Module, path: str, weights: AdaptedWeights
) -> tuple[dict[str, _Linear], dict[str, str]]:
    """The layers to calibrate, and of all other changed weights of the decoder layer why they are not."""
    linear: dict[str, _Linear] = {}
    fallbacks: dict[str, str] = {}
    for owner, module, output in changed_weights(layer, path, weights):
        if not isinstance(module, nn.Linear):
            fallbacks[output.name] = OUTSIDE
        elif not isinstance(output.decoded, DecodedTensor):
            fallbacks[output.name] = "the base does not hold it quantized"
        else:
            meant = module.weight.data
            linear[owner] = _Linear(owner, module, output, output.decoded.weight, meant, meant)
    return linear, fallbacks


# What a layer gets in both models, row by row.


@dataclass
class _Seen:
    """One forward of one row: inputs and outputs of linear layers, and what other modules get."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    result: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory that it holds; layers beside each other share what they get."""
        parts = [*self.inputs.values(), *self.outputs.values(), *self.others.values()]
        return sum({id(one): one.nbytes for one in parts}.values())


class _Enough(Exception):
    """What is wanted of a forward is there, and the rest of the layer need not be computed."""


class _Pair:
    """A decoder layer with the weights of the one model or of the other."""

    def __init__(
        self,
        model: LayerwiseModel,
        layer: nn.Module,
        linear: list[_Linear],
        rows: Calibration,
        streams: _Streams,
    ) -> None:
        self.model, self.layer, self.linear, self.rows, self.streams = model, layer, linear, rows, streams
        self.reached: list[_Linear] = []
        self._kept: dict[int, _Seen] = {}
        self._kept_bytes = 0

    def groups(self) -> list[list[_Linear]]:
        """Linear layers that get the same tensor, in the order in which they are called."""
        groups: list[list[_Linear]] = []
        called: set[str] = set()
        for row in range(len(self.rows.rows)):
            seen = self.meant(row)
            for path, inputs in seen.inputs.items():
                if path in called:
                    continue
                called.add(path)
                one = next(each for each in self.linear if each.path == path)
                self.reached.append(one)
                same = next((g for g in groups if seen.inputs.get(g[0].path) is inputs), None)
                if same is None:
                    groups.append([one])
                else:
                    same.append(one)
            if len(called) == len(self.linear):
                break
        return groups

    def meant(self, row: int) -> _Seen:
        """One row through the layer of the adapter model, which no fit of this layer changes."""
        seen = self._kept.get(row)
        if seen is None:
            seen = self._run(row, made=False)
            if self._kept_bytes + seen.nbytes <= MOST_KEPT:
                self._kept[row] = seen
                self._kept_bytes += seen.nbytes
        return seen

    def made(self, row: int, until: str | None = None) -> _Seen:
        """One row through the layer of the merge, at most to what a linear layer gets."""
        return self._run(row, made=True, until=until)

    def _run(self, row: int, *, made: bool, until: str | None = None) -> _Seen:
        for one in self.linear:
            one.module.weight.data = one.made if made else one.meant
        states = (self.streams.made if made else self.streams.meant)[row]
        seen = _Seen()
        with _watching(self.layer, self.linear, seen, until, outputs=row == 0), suppress(_Enough):
            seen.result = self.model.advance(self.rows.rows[row], states)
            require_finite(seen.result, self.model, row)
        return seen

    def advance(self) -> None:
        """The hidden states behind the layer, in both models."""
        for row in range(len(self.rows.rows)):
            meant, made = self.meant(row).result, self.made(row).result
            assert meant is not None and made is not None
            self.streams.meant[row], self.streams.made[row] = meant.cpu(), made.cpu()

    def residual(self, path: str) -> str | None:
        """What the output of a linear layer is added to: "" for the layer's input, or whose input that is.

        Found by trying, on one row: architectures name their norms as they like. None where the output goes
        another way.
        """
        seen = self.meant(0)
        output, start = seen.outputs[path], self.streams.meant[0].to(seen.outputs[path])
        if output.shape != start.shape:
            return None
        assert seen.result is not None
        ends = [*seen.others.values(), seen.result]
        for name, source in (("", start), *seen.others.items()):
            if source.shape == output.shape and any(_same(source + output, end) for end in ends):
                return name
        return None

    def residual_of(self, row: int, seen: _Seen, source: str, *, made: bool) -> torch.Tensor:
        """The residual stream of one row."""
        if source:
            return seen.others[source]
        return (self.streams.made if made else self.streams.meant)[row]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one, other.to(one), rtol=1e-4, atol=1e-5))


@contextmanager
def _watching(
    layer: nn.Module, linear: Sequence[_Linear], seen: _Seen, until: str | None, *, outputs: bool
) -> Iterator[None]:
    """Note in `seen` what passes; `_Enough` is raised where the linear layer at `until` gets its input."""
    hooks = []
    for one in linear:

        def given(module: nn.Module, args: Any, path: str = one.path) -> None:
            seen.inputs[path] = args[0]
            if path == until:
                raise _Enough

        def made(module: nn.Module, args: Any, output: Any, path: str = one.path) -> None:
            seen.outputs[path] = output.reshape(-1, output.shape[-1])

        hooks.append(one.module.register_forward_pre_hook(given))
        if outputs:
            hooks.append(one.module.register_forward_hook(made))
    for name, child in layer.named_children():
        if not any(one.path == name or one.path.startswith(f"{name}.") for one in linear):

            def other(module: nn.Module, args: Any, name: str = name) -> None:
                if args and isinstance(args[0], torch.Tensor):
                    seen.others[name] = args[0].reshape(-1, args[0].shape[-1])

            hooks.append(child.register_forward_pre_hook(other))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# One group of linear layers: its moments, its target, its codes.


def _fit_group(
    pair: _Pair,
    group: Sequence[_Linear],
    weights: AdaptedWeights,
    codes: dict[str, torch.Tensor],
    counts: dict[str, Counts],
) -> str:
    """Round the layers of a group; returns why that cannot be done, or nothing."""
    size = group[0].meant.shape[1]
    moments, cross = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    source = pair.residual(group[0].path) if len(group) == 1 else None
    residual = None
    if source is not None:
        residual = torch.zeros(group[0].meant.shape[0], size, dtype=torch.float64)
    tokens = 0
    for row in range(len(pair.rows.rows)):
        meant, made = pair.meant(row), pair.made(row, until=group[0].path)
        if group[0].path not in meant.inputs or group[0].path not in made.inputs:
            continue  # an expert that this row does not reach
        x, z = (seen.inputs[group[0].path].reshape(-1, size).float() for seen in (meant, made))
        moments += (z.T @ z).cpu()
        tokens += len(z)
        if len(x) == len(z):
            cross += ((x - z).T @ z).cpu()
            if residual is not None and source is not None:
                of_meant = pair.residual_of(row, meant, source, made=False)
                of_made = pair.residual_of(row, made, source, made=True)
                residual += ((of_meant.to(z) - of_made.to(z)).T @ z).cpu()
    settings = Feedback()
    curvature = find_curvature(moments, tokens, settings)
    if isinstance(curvature, str):
        return curvature
    damped = moments / tokens
    damped.diagonal().add_(CORRECTION_DAMPING * float(damped.diagonal().mean()))
    factors = torch.linalg.lu_factor(damped)
    for one in group:
        wanted = SHARE_OF_INPUTS * (one.meant.cpu().double() @ (cross / tokens))
        if residual is not None:
            wanted += SHARE_OF_RESIDUAL * residual / tokens
        target = one.meant.cpu().double() + torch.linalg.lu_solve(*factors, wanted.T).T
        raw, values, counted = _round(one, target, weights.before(one.output), curvature, settings)
        codes[one.output.name], counts[one.output.name] = raw, counted
        one.made = values.to(one.meant.device)
    return ""


def _round(
    one: _Linear, target: torch.Tensor, before: torch.Tensor, curvature: Curvature, settings: Feedback
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, float, float]]:
    """The stored bytes, the numbers that they stand for, and the counts of one weight."""
    rows = len(target)
    meant, base = one.meant.cpu(), before.view(one.meant.shape)
    places = np.empty(target.shape, dtype=np.int64)
    values = torch.empty(target.shape, dtype=torch.float32)
    edges = list(range(0, rows, _PART_ROWS))

    def work(start: int) -> None:
        stop = min(start + _PART_ROWS, rows)
        # Inference mode is the caller's thread's alone.
        with torch.inference_mode():
            part = _round_rows(
                one.weight,
                start,
                stop,
                target[start:stop],
                meant[start:stop],
                base[start:stop],
                curvature,
                settings,
            )
        places[start:stop], values[start:stop] = part

    with Workers() as workers:
        workers.map(work, edges)
    raw, changed = bytearray(), 0
    for start in range(0, rows, one.weight.unit):
        block = one.weight.block(start, min(start + one.weight.unit, rows))
        here = places[start : start + one.weight.unit]
        changed += int(np.count_nonzero(here != block.places))
        raw += one.weight.encode(start, block.codes_at(here))
    update = meant - base
    squares = [float(tensor.double().square().sum()) for tensor in (base, update)]
    counted = (changed, int(torch.count_nonzero(update)), squares[0], squares[1])
    return torch.frombuffer(raw, dtype=torch.uint8), values, counted


def _round_rows(
    weight: QuantizedWeight,
    start: int,
    stop: int,
    target: torch.Tensor,
    meant: torch.Tensor,
    base: torch.Tensor,
    curvature: Curvature,
    settings: Feedback,
) -> tuple[Any, torch.Tensor]:
    """Places among the levels' points, and the numbers, of some rows."""
    block, order = weight.block(start, stop), curvature.order
    grid = LevelGrid.around(meant[:, order].T.contiguous(), block, order)
    wanted = target[:, order].T.contiguous()
    update = (target - base.double())[:, order].T
    rounded = fit_to_grid(wanted, update, curvature, grid, settings)
    ordered = np.empty(block.codes.shape, dtype=np.int64)
    ordered[:, order.numpy()] = grid.places(rounded).T.numpy()
    # Where the scale is zero all points are one number: the base's code stays.
    ordered = np.where(block.steps == 0, block.places, ordered)
    values = torch.from_numpy(block.at_places(ordered)).float()
    return ordered, values
