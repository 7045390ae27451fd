"""The draft's training loop: accelerate's, seeded, with checkpoints that continue to the same weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lorasmith.errors import CheckpointError, MachineError, UsageError, os_errors
from lorasmith.files.atomic import aside, publish_folder
from lorasmith.followup.drafts.loss import Weights, batch_loss
from lorasmith.followup.drafts.rows import DraftRow, Split
from lorasmith.models.batches import split_batch
from lorasmith.options import DraftOptions
from lorasmith.progress import Progress
from lorasmith.records.followup import DraftStep

_PART_TOKENS = 2048
"""Padded tokens of one forward and backward pass: the memory of training grows with it."""

_STATE = "state.json"


@dataclass
class Course:
    """How far a training has come."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validations: list[DraftStep] = field(default_factory=list)
    best_step: int = 0
    stopped_early: bool = False


def make_batches(count: int, options: DraftOptions) -> list[list[int]]:
    """Seeded batches of places in the training rows; the last epoch may be a fraction."""
    total = math.ceil(options.epochs * count / options.batch_size)
    # All of them from the seed, at once: a checkpoint needs the number of its step and no state of a stream.
    generator = np.random.Generator(np.random.PCG64(options.seed))
    batches: list[list[int]] = []
    while len(batches) < total:
        order = generator.permutation(count).tolist()
        batches += [order[at : at + options.batch_size] for at in range(0, count, options.batch_size)]
    return batches[:total]


class Trainer:
    """One training: model, head, optimizer, and the folder where it can be taken up again."""

    def __init__(
        self,
        model: Any,
        head: torch.nn.Linear | None,
        rows: Sequence[DraftRow],
        split: Split,
        options: DraftOptions,
        checkpoint: Path,
        key: str,
    ) -> None:
        from accelerate import Accelerator

        self.rows, self.split, self.options = rows, split, options
        self.checkpoint, self.key = checkpoint, key
        device = next(model.parameters()).device
        # On processors without a matrix unit for bfloat16 autocast is slower than float32, and less exact.
        mixed = "bf16" if device.type == "cuda" else "no"
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)
        self.module = torch.nn.ModuleDict(
            {"draft": model} if head is None else {"draft": model, "head": head}
        )
        self.batches = make_batches(len(split.train), options)
        optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            betas=(0.9, 0.99),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        self.module, self.optimizer, self.schedule = self.accelerator.prepare(
            self.module, optimizer, schedule
        )
        self.device = device
        self.course = Course()
        self.best: dict[str, torch.Tensor] = {}

    def run(self, progress: Progress) -> Course:
        """Train to the end, from the checkpoint where there is one; the best weights are then in the model.

        Raises `UsageError` for a checkpoint of other inputs or settings, `MachineError` for a loss that is
        not a number.
        """
        torch.manual_seed(self.options.seed)
        self._load()  # after the seed, which a checkpoint's own random state replaces
        with progress("Draft", total=len(self.batches), unit="step") as advance:
            advance(self.course.step)
            while self.course.step < len(self.batches) and not self.course.stopped_early:
                self._step(self.batches[self.course.step])
                advance(1)
                last = self.course.step == len(self.batches)
                if last or self.course.step % self.options.validate_every == 0:
                    # Saved only here, so that a training that goes on decides on the same losses.
                    self._validate()
                    self._save()
        self._core().load_state_dict(self.best)
        return self.course

    def _rate(self, step: int) -> float:
        rising = max(1, round(self.options.warmup * len(self.batches)))
        if step < rising:
            return (step + 1) / rising
        # Half a cosine down to a tenth: the end still learns, and no later rate is above an earlier one.
        done = (step - rising) / max(1, len(self.batches) - rising)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def _core(self) -> torch.nn.ModuleDict:
        return self.accelerator.unwrap_model(self.module)

    def _step(self, places: Sequence[int]) -> None:
        rows = [self.rows[self.split.train[place]] for place in places]
        self.module.train()
        loss = 0.0
        for share in self._shares(rows):
            self.accelerator.backward(share)
            loss += float(share.detach())
        if not math.isfinite(loss):
            raise MachineError(
                f"the loss of step {self.course.step + 1} is not a number",
                remedy="give a lower --learning-rate and start again from an empty output",
            )
        self.accelerator.clip_grad_norm_(self.module.parameters(), self.options.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.course.step += 1
        self.course.losses.append(round(loss, 6))

    def _shares(self, rows: Sequence[DraftRow]) -> Iterator[torch.Tensor]:
        """The batch's loss in parts that fit in memory."""
        core, weights = self._core(), Weights.of(self.options)
        head = cast("torch.nn.Linear", core["head"]) if "head" in core else None
        tokens = sum(row.scored for row in rows)
        labelled = sum(row.label >= 0 for row in rows)
        for part in split_batch(rows, _PART_TOKENS):
            with self.accelerator.autocast():
                yield batch_loss(
                    core["draft"], head, part, weights, self.device, tokens=tokens, labelled=labelled
                )

    def _validate(self) -> None:
        rows = [self.rows[index] for index in self.split.validation]
        self.module.eval()
        with torch.no_grad():
            loss = sum(float(share) for share in self._shares(rows))
        course = self.course
        better = not course.validations or loss < min(step.loss for step in course.validations)
        course.validations.append(DraftStep(step=course.step, loss=loss))
        if better:
            course.best_step = course.step
            self.best = {
                name: value.detach().cpu().clone() for name, value in self._core().state_dict().items()
            }
        since = sum(step.step > course.best_step for step in course.validations)
        course.stopped_early = since >= self.options.patience

    def _save(self) -> None:
        """A checkpoint, whole or not at all: weights, best weights, optimizer, random state, how far."""
        temporary = aside(self.checkpoint)
        shutil.rmtree(temporary, ignore_errors=True)
        course = self.course
        state = {
            "key": self.key,
            **asdict(course),
            "validations": [step.model_dump() for step in course.validations],
        }
        with os_errors(self.checkpoint, "write the checkpoint"):
            temporary.mkdir(parents=True)
            _save_tensors(self._core().state_dict(), temporary / "model.safetensors")
            _save_tensors(self.best, temporary / "best.safetensors")
            torch.save(
                {
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "random": torch.get_rng_state(),
                },
                temporary / "optimizer.pt",
            )
            (temporary / _STATE).write_text(json.dumps(state))
        publish_folder(temporary, self.checkpoint)

    def _load(self) -> None:
        """Continue from the checkpoint, if there is one; `UsageError` for one of another training."""
        if not (self.checkpoint / _STATE).is_file():
            return
        try:
            state = json.loads((self.checkpoint / _STATE).read_text())
            key = state.pop("key")
            kept = torch.load(self.checkpoint / "optimizer.pt", weights_only=True)
            weights, best = (load_file(self.checkpoint / f"{name}.safetensors") for name in ("model", "best"))
        except Exception as error:  # three libraries read it, each with errors of its own for a cut file
            raise CheckpointError(
                f"the unfinished training here is damaged: {type(error).__name__}: {error}",
                where=self.checkpoint,
                remedy="remove the checkpoint, and give the same command again: it begins anew",
            ) from error
        if key != self.key:
            raise UsageError(
                "the unfinished training here is of other inputs, settings or versions",
                where=self.checkpoint,
                remedy="give the same command again, choose another output, or remove the checkpoint",
            )
        validations = [DraftStep.model_validate(step) for step in state.pop("validations")]
        self.course = Course(**state, validations=validations)
        self._core().load_state_dict(weights)
        self.best = best
        self.optimizer.load_state_dict(kept["optimizer"])
        self.schedule.load_state_dict(kept["schedule"])
        torch.set_rng_state(kept["random"])


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Tied tensors are written once each: safetensors refuses shared memory, and loading ties them again."""
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)
