"""Engines that answer prompts, behind one small interface: transformers on any device, vLLM on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasmith.checkpoint.jsonfile import read_object
from lorasmith.errors import CheckpointError, UsageError
from lorasmith.files.journal import Rows
from lorasmith.models.arithmetic import Route, choose_route, resolve_device, use_route
from lorasmith.models.conditions import conditions_of
from lorasmith.models.continuous import generate_continuously
from lorasmith.models.generate import stop_tokens
from lorasmith.models.load import load_model
from lorasmith.models.requests import Answer, Limits, Request
from lorasmith.models.sampling import Sampling
from lorasmith.models.unpack import gguf_file
from lorasmith.records.conditions import Conditions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SLOTS_CPU, SLOTS_GPU = 16, 64
"""Rows under way at once. On a processor a step is already bound by arithmetic at 16; a GPU still gains."""


@dataclass(frozen=True)
class Made:
    """Where an answer comes from."""

    rows: Rows
    """The group that was handed out with it; none in this process."""
    conditions: Conditions


class Engine(ABC):
    """A loaded model that answers; a subclass is final."""

    name: str
    dtype: str
    """Data type of the weights while they compute."""
    tokenizer: Any
    context: int | None
    """Longest sequence in tokens, where the model has a limit."""
    cuts: bool = False
    """Whether it cuts the requests into groups itself, and so wants all of them at once."""

    def made(self) -> Made | None:
        """Where the answer comes from that was given last; None where the engine does not tell."""
        return None

    @abstractmethod
    def stops(self, template: str) -> frozenset[int]:
        """Tokens that end an answer: the template's end of turn, and what the folder names as EOS."""

    @abstractmethod
    def answers(
        self,
        requests: Iterable[Request],
        limits: Limits,
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[Answer]:
        """Each request's answer as it ends, none left out; requests are taken when there is room.

        What cannot be answered comes back as `failed`. A row's answer does not depend on the others.
        """


class TransformersEngine(Engine):
    """transformers' models with our continuous batching."""

    name = "transformers"

    def __init__(
        self,
        model: Path,
        adapter: Path | None,
        *,
        device: str,
        dtype: str,
        batch_size: int | None,
        device_map: str | None = None,
    ) -> None:
        place = resolve_device(device)
        self.route = generation_route(dtype, place)
        self.dtype = resolve_dtype(model, dtype, place.type)
        self.loaded = load_model(
            model, adapter=adapter, device=place, dtype=DTYPES[self.dtype], device_map=device_map
        )
        self.tokenizer, self.context = self.loaded.tokenizer, self.loaded.context
        self.slots = batch_size or default_slots(place.type)

    def made(self) -> Made:
        return Made((), conditions_of(self.loaded.device))

    def stops(self, template: str) -> frozenset[int]:
        return frozenset(stop_tokens(self.loaded, template))

    def answers(
        self,
        requests: Iterable[Request],
        limits: Limits,
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[Answer]:
        with use_route(self.route):
            yield from generate_continuously(
                self.loaded, requests, limits, sampling=sampling, slots=self.slots, on_tokens=on_tokens
            )


def generation_route(dtype: str, device: torch.device) -> Route:
    """torch's own float32 route: a step multiplies a few rows only, where oneDNN took up to twice as long.

    It is also the route of plain `generate`, so that greedy texts are compared like with like.
    """
    return choose_route("bfloat16" if dtype == "bfloat16" and device.type == "cpu" else "mkl", device)


def check_batch_size(batch_size: int | None) -> None:
    """Raises `UsageError` for less than one row at a time."""
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size is {batch_size}", expected="1 or more")


def default_slots(device_type: str) -> int:
    """Rows under way at once where nobody says how many."""
    return SLOTS_CPU if device_type == "cpu" else SLOTS_GPU


def resolve_dtype(model: Path, asked: str, device_type: str) -> str:
    """`auto` is float32 on a processor, and on other devices what the model folder was saved in."""
    if asked != "auto":
        if asked not in DTYPES:
            raise UsageError(f"there is no data type {asked!r}", expected=" | ".join(["auto", *DTYPES]))
        return asked
    if device_type == "cpu":
        return "float32"
    config: dict[str, Any] = {} if gguf_file(model) else read_object(model / "config.json", CheckpointError)
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return named if named in DTYPES else "bfloat16"


def open_engine(
    name: str,
    model: Path,
    adapter: Path | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    device_map: str | None = None,
    max_length: int | None = None,
) -> Engine:
    """Load the model into the engine of that name; raises `UsageError` for one that is not there."""
    check_batch_size(batch_size)
    if name == "transformers":
        return TransformersEngine(
            model, adapter, device=device, dtype=dtype, batch_size=batch_size, device_map=device_map
        )
    if name == "vllm":
        if device_map is not None:
            raise UsageError(
                "the vllm engine takes no device map",
                remedy="leave it out: vLLM holds the whole model on its GPU, or give --engine transformers",
            )
        from lorasmith.followup.respond_vllm import VllmEngine

        return VllmEngine(
            model, adapter, device=device, dtype=dtype, batch_size=batch_size, max_length=max_length
        )
    raise UsageError(f"there is no engine {name!r}", expected="transformers | vllm")
