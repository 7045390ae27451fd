"""The rows that a calibrated merge looks at: of a training file, never of the test set, within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.header import TensorFile
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.checkpoint.names import resolve
from lorasmith.checkpoint.values import read_tensor
from lorasmith.data.rows import read_examples
from lorasmith.errors import DataError
from lorasmith.files.digests import sha256_file
from lorasmith.merging.numbers.threads import Workers
from lorasmith.merging.plan import Output, Plan
from lorasmith.merging.tensors import Factors
from lorasmith.merging.writers import make_writer
from lorasmith.models.chat_template import use_template
from lorasmith.models.conversation import Wording
from lorasmith.models.load import has_tokenizer, load_tokenizer
from lorasmith.models.text import encode_examples
from lorasmith.options import TemplateOptions
from lorasmith.records.base import FileDigest
from lorasmith.records.merging import CalibrationUse

LONGEST = 2_048
"""Longer rows lose the beginning of their prompt."""


@dataclass(frozen=True)
class Calibration:
    """Rows in tokens, in a fixed order."""

    rows: list[list[int]]
    use: CalibrationUse
    """What of them the record of the merge tells."""


def load_calibration(
    files: Sequence[Path],
    base: Path,
    adapters: Sequence[Path],
    *,
    budget: int,
    test_set: Path | None,
    leave_out: bool,
    wording: TemplateOptions,
    seed: int,
) -> Calibration:
    """Rows of `files` in an order drawn by `seed`, as many as `budget` tokens hold.

    Raises `DataError` where there are no rows; and for rows that are in the test set by their content, unless
    they are to be left out: what the merge was fitted to could not be measured on them.
    """
    examples = [example for file in files for example in read_examples(file)]
    held_out = set() if test_set is None else {example.content for example in read_examples(test_set)}
    own = [example for example in examples if example.content not in held_out]
    if len(own) < len(examples) and not leave_out:
        shared = next(example for example in examples if example.content in held_out)
        raise DataError(
            f"{len(examples) - len(own)} of {len(examples)} calibration rows are in the test set, such as "
            f"{shared.id!r}",
            where=files[0],
            expected="rows that the test set does not hold",
            remedy="calibrate on the training file, or take these rows out (`lorasmith testset split`)",
        )
    if not own:
        raise DataError(
            "there are no calibration rows" + (" beside those of the test set" if examples else ""),
            where=files[0],
            expected="at least one row",
        )
    folder = next((folder for folder in adapters if has_tokenizer(folder)), None)
    tokenizer = load_tokenizer(base, adapter=folder)
    use_template(tokenizer, wording.chat_template)
    encoded = encode_examples(
        own, tokenizer, template=wording.template, wording=Wording.of(wording), max_length=LONGEST
    )
    chosen: list[list[int]] = []
    left = budget
    for place in np.random.default_rng(seed).permutation(len(own)).tolist():
        ids = encoded.rows[place].ids
        # A row that is too long for what is left is passed over: shorter ones may still fit.
        if len(ids) <= left:
            chosen.append(ids)
            left -= len(ids)
    use = CalibrationUse(
        files=[
            FileDigest(path=file.name, bytes=file.stat().st_size, sha256=sha256_file(file)) for file in files
        ],
        rows=len(chosen),
        tokens=budget - left,
        left_out=len(examples) - len(own),
        test_set_checked=test_set is not None,
    )
    return Calibration(chosen, use)


# The adapter model's own tensors in float32, one at a time: what a layer of it computes with.


_EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""A stack that transformers fuses in memory → the names of one expert's matrices on disk, side by side."""


class AdaptedWeights:
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
        candidates = [self._outputs.get(f"{path}.{leaf}") for path in resolve(module, self._modules)]
        return candidates[0] if len(candidates) == 1 else None

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
        stored = self._stored(output)
        if output.source.dtype not in ("F64", "F32", "BF16", "F16"):
            return stored
        result = torch.empty(output.elements, dtype=torch.float32)
        if output.elements:
            with Workers() as workers:
                writer = make_writer(replace(output, dtype="F32"), self._factors, shard, workers)
                writer.piece(stored.reshape(-1).view(torch.uint8), 0, result.view(torch.uint8))()
        return result.view(output.shape)

    def before(self, output: Output) -> torch.Tensor:
        """The float32 values that the adapters change."""
        return self._stored(output).to(torch.float32).view(output.shape)

    def _stored(self, output: Output) -> torch.Tensor:
        """W as it is stored; in float64 where it is decoded."""
        if output.decoded is not None:
            return output.decoded.read(0, output.source.elements).view(output.source.shape)
        adapter = output.adapter
        file = self._files[output.name].path if adapter is None else self._adapters[adapter].file.path
        return read_tensor(file, output.source)

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
