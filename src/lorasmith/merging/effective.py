"""The adapter model's own tensors in float32, one at a time: what a layer of it computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.header import TensorFile
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.checkpoint.names import resolve
from lorasmith.merging.plan import Output, Plan
from lorasmith.merging.recipes import make_recipe
from lorasmith.merging.tensors import Factors, read_tensor
from lorasmith.merging.workers import Workers

_EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""A stack that transformers fuses in memory → the names of one expert's matrices on disk, side by side."""


class Effective:
    """Reads W + Σ w·s·B·A (or what else the plan says) by the name of a module's tensor, rounded to float32.

    Against the factors applied on their own this differs by float32's own rounding, 2⁻¹⁵ of a bfloat16 step.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[Adapter], plan: Plan) -> None:
        self._adapters = adapters
        self._factors = Factors(adapters)
        self._files: dict[str, TensorFile] = {}
        self._outputs: dict[str, Output] = {}
        for shard in base.shards:
            for output in plan.shards[shard.path.name]:
                self._outputs[output.name] = output
                self._files[output.name] = shard
        self._modules = {name.rpartition(".")[0] for name in self._outputs}

    def output(self, name: str) -> Output | None:
        """The merged tensor that a module's tensor is stored as; None where there is none of its own."""
        if name in self._outputs:
            return self._outputs[name]
        module, _, leaf = name.rpartition(".")
        found = [self._outputs.get(f"{path}.{leaf}") for path in resolve(module, self._modules)]
        return found[0] if len(found) == 1 else None

    def __call__(self, name: str) -> torch.Tensor:
        """The float32 values; `KeyError` for a tensor that the merged model does not hold."""
        output = self.output(name)
        return self.values(output) if output is not None else self._stack(name)

    @torch.inference_mode(False)
    def values(self, output: Output) -> torch.Tensor:
        """The float32 values of a merged tensor, before its own rounding.

        Outside of inference mode, which the forward passes around it are in: it holds for one thread alone,
        and the threads that write here could not write to its tensors.
        """
        shard = self._files[output.name]
        file = shard.path if output.adapter is None else self._adapters[output.adapter].file.path
        stored = read_tensor(file, output.source)
        if output.source.dtype not in ("F64", "F32", "BF16", "F16"):
            return stored
        result = torch.empty(output.elements, dtype=torch.float32)
        if output.elements:
            with Workers() as workers:
                recipe = make_recipe(replace(output, dtype="F32"), self._factors, shard, workers)
                recipe.piece(stored.reshape(-1).view(torch.uint8), 0, result.view(torch.uint8))()
        return result.view(output.shape)

    def before(self, output: Output) -> torch.Tensor:
        """The float32 values that the adapters change."""
        stored = read_tensor(self._files[output.name].path, output.source)
        return stored.to(torch.float32).view(output.shape)

    def _stack(self, name: str) -> torch.Tensor:
        """Experts that are fused in memory and stored one by one: [E, O, I]."""
        owner, _, leaf = name.rpartition(".")
        for parts in _EXPERT_PARTS.get(leaf, ()):
            experts: list[torch.Tensor] = []
            while all(self.output(f"{owner}.{len(experts)}.{part}.weight") for part in parts):
                here = [self(f"{owner}.{len(experts)}.{part}.weight") for part in parts]
                experts.append(torch.cat(here, dim=0))
            if experts:
                return torch.stack(experts)
        raise KeyError(name)
