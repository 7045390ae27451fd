"""The linear layers of one decoder layer, rounded with error feedback: rows of matrices in threads.

Layers that get the same input share its second moment, and their rows lie in one stack: the columns are gone
through once for all of them. A stack is cut into the same parts whatever the number of threads, and each part
is one thread's: the bytes do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lorasmith.merging.effective import Effective
from lorasmith.merging.feedback import Curvature, Feedback, SingularError, prepare, round_with_feedback
from lorasmith.merging.moments import Moments
from lorasmith.merging.plan import Output
from lorasmith.merging.rounding import TARGETS
from lorasmith.merging.workers import Workers

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
    linear: Mapping[str, Linear], moments: Sequence[Moments], effective: Effective, settings: Feedback
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
                stacks += _stacks(layers, effective, curvature)
        parts = [part for stack in stacks for part in stack.parts()]
        # The longest first, so that no thread is left with it at the end.
        parts.sort(key=lambda part: (part[2] - part[1]) * part[0].values.shape[1] ** 2, reverse=True)
        if parts:
            workers.map(lambda part: _round(*part, settings), parts)
    return {name: tensor for stack in stacks for name, tensor in _apart(stack)}, why


def _curvature(group: Moments, settings: Feedback) -> Curvature | str:
    """Or why there is none."""
    inputs = len(group.total)
    if group.tokens < LEAST_TOKENS * inputs:
        return f"{group.tokens} tokens are too few for {inputs} inputs"
    try:
        return prepare(group.total.cpu() / group.tokens, settings)
    except SingularError as error:
        return str(error)


def _stacks(layers: Sequence[Linear], effective: Effective, curvature: Curvature) -> list[_Stack]:
    found = []
    for dtype in sorted({layer.output.dtype for layer in layers}):
        here = [layer for layer in layers if layer.output.dtype == dtype]
        values = _rows(here, [effective.values(layer.output) for layer in here])
        base = _rows(here, [effective.before(layer.output) for layer in here])
        found.append(_Stack(here, values, base, curvature))
    return found


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
    found: list[tuple[str, torch.Tensor]] = []
    start = 0
    for layer in stack.layers:
        shape = layer.output.shape
        rows = stack.values[start : start + shape[-1 if layer.transposed else 0]]
        start += len(rows)
        stored = (rows.T if layer.transposed else rows).to(TARGETS[layer.output.dtype].native)
        found.append((layer.output.name, stored.contiguous()))
    return found
