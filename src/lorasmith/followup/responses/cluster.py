"""Answers from a cluster: groups of rows go to workers, each of which batches its group continuously.

The driver needs the tokenizer alone. A row's text does not depend on where it is made: greedy decoding has
nothing random, and a drawn token comes from the row's own stream, seeded by the row's content.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from lorasmith.errors import CheckpointError
from lorasmith.executors.base import ChunkLog, Executor, Unsplittable, WorkSpec
from lorasmith.executors.storage import files_digest, require_same_files
from lorasmith.files.journal import Rows
from lorasmith.followup.responses.engines import (
    Engine,
    Made,
    TransformersEngine,
    check_batch_size,
    default_slots,
    resolve_dtype,
)
from lorasmith.models.device import conditions_of, resolve_device
from lorasmith.models.generation.decoding import GeneratedAnswer, GenerationLimits, Request, Sampling
from lorasmith.models.generation.generate import ending_tokens
from lorasmith.models.load import context_of, load_tokenizer, quiet_libraries, require_file
from lorasmith.records.scoring import Conditions

ROUNDS = 8
"""A group is so many times the rows under way at once. With lengths spread exponentially and cut at 1,024,
its slots are then busy four fifths of the steps (two thirds with 4, simulated), and nine tenths where most
rows reach the limit; a lost worker costs one group."""


class ClusterEngine(Engine):
    """The transformers engine, once in each worker."""

    name = "transformers"
    cuts = True

    def __init__(
        self,
        executor: Executor,
        model: Path,
        adapter: Path | None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | None = None,
        device_map: str | None = None,
        group_rows: int | None = None,
    ) -> None:
        """`group_rows` fixes the size of a group; else it follows from the rows, slots and workers."""
        check_batch_size(batch_size)
        require_file(model, "config.json", CheckpointError)
        place = resolve_device(device)
        self.executor, self.folder, self.group_rows = executor, model, group_rows
        self.dtype = resolve_dtype(model, dtype, place.type)
        self.tokenizer = load_tokenizer(model, adapter=adapter)
        with quiet_libraries():
            self.config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        self.context = context_of(self.config)
        self.slots = batch_size or default_slots(place.type)
        folders = [model] if adapter is None else [model, adapter]
        self.arguments = {
            "model": str(model.absolute()),
            "adapter": None if adapter is None else str(adapter.absolute()),
            "files": files_digest(folders),
            "device": place.type,  # no worker takes another than the one that `auto` is here
            "dtype": self.dtype,
            "batch_size": self.slots,
            "device_map": device_map,
        }
        self.gpu = place.type == "cuda"
        self.log = ChunkLog()
        """What computed each group of this command."""
        self._given: Rows = ()
        """The group whose answers are being given."""

    def made(self) -> Made:
        return Made(self._given, self.log.of(self._given))

    def stops(self, template: str) -> frozenset[int]:
        with quiet_libraries():
            if (self.folder / GENERATION_CONFIG_NAME).is_file():
                named = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
            else:
                named = GenerationConfig.from_model_config(self.config)
        return frozenset(ending_tokens(self.tokenizer, getattr(named, "eos_token_id", None), template))

    def answers(
        self,
        requests: Iterable[Request],
        limits: GenerationLimits,
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[GeneratedAnswer]:
        every = {request.index: request for request in requests}
        spec = WorkSpec(
            open_responding,
            {**self.arguments, "limits": limits, "sampling": sampling},
            self.gpu,
            parcel=lambda rows: [every[row] for row in rows],
        )
        order, work = list(every), Responding(None, limits, sampling)
        with self.executor as executor:
            size = self.group_rows or group_size(len(order), self.slots, executor.places(spec))
            groups = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
            for rows, answers in executor.map_chunks(groups, work, None, spec, self.log):
                on_tokens(sum(len(answer.tokens) + (answer.end is not None) for answer in answers))
                for row in rows:
                    del every[row]
                self._given = rows
                yield from answers


def group_size(rows: int, slots: int, workers: int) -> int:
    """Rows of a group: `ROUNDS` times the slots, less where workers would go without.

    Each worker gets two groups where there are rows enough, so that a slow one does not hold up the end; but
    no group is smaller than the slots while a worker's share of the rows fills them.
    """
    share = -(-rows // max(1, workers))
    return max(1, min(ROUNDS * slots, max(-(-share // 2), min(slots, share))))


class Responding(Unsplittable):
    """Groups of rows as work: a worker has the engine, the driver takes the answers."""

    def __init__(
        self, engine: TransformersEngine | None, limits: GenerationLimits, sampling: Sampling
    ) -> None:
        self.engine, self.limits, self.sampling = engine, limits, sampling
        self.requests: list[Request] = []

    def take(self, parcel: list[Request]) -> None:
        """The prompts of the coming group."""
        self.requests = parcel

    def run(self, rows: Rows) -> list[GeneratedAnswer]:
        """Answers as they end; continuous batching sees to memory itself."""
        assert self.engine is not None, "the driver has no model"
        return list(self.engine.answers(self.requests, self.limits, self.sampling, lambda count: None))

    def pack(self, result: list[GeneratedAnswer]) -> bytes:
        """The answers as bytes for the way to the driver; both ends are the same version of this code."""
        return pickle.dumps(result)

    def unpack(self, rows: Rows, packed: bytes) -> list[GeneratedAnswer]:
        """Back from `pack`."""
        return cast(list[GeneratedAnswer], pickle.loads(packed))

    def conditions(self) -> Conditions:
        """The conditions of this process."""
        assert self.engine is not None, "the driver computes nothing"
        return conditions_of(self.engine.loaded.device)


@contextmanager
def open_responding(
    model: str, adapter: str | None, files: str, limits: GenerationLimits, sampling: Sampling, **options: Any
) -> Iterator[Responding]:
    """Load the engine in another process; raises `CheckpointError` where its files are not the driver's."""
    require_same_files(files, model, adapter)
    engine = TransformersEngine(Path(model), None if adapter is None else Path(adapter), **options)
    yield Responding(engine, limits, sampling)
