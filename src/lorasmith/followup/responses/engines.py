"""Engines that answer prompts, behind one small interface: transformers on any device, vLLM on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lorasmith.checkpoint.header import read_object
from lorasmith.errors import CheckpointError, MachineError, UsageError
from lorasmith.files.journal import Rows
from lorasmith.models.device import Route, choose_route, conditions_of, resolve_device, use_route
from lorasmith.models.generation.continuous import generate_continuously
from lorasmith.models.generation.decoding import GeneratedAnswer, GenerationLimits, Request, Sampling
from lorasmith.models.generation.generate import ending_tokens, stop_tokens
from lorasmith.models.load import gguf_file, load_model, load_tokenizer
from lorasmith.records.scoring import Conditions

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
        limits: GenerationLimits,
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[GeneratedAnswer]:
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
        limits: GenerationLimits,
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[GeneratedAnswer]:
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

        return VllmEngine(
            model, adapter, device=device, dtype=dtype, batch_size=batch_size, max_length=max_length
        )
    raise UsageError(f"there is no engine {name!r}", expected="transformers | vllm")


# The vLLM engine (extra `vllm`, for GPUs): tested against a stand-in of its interface, not on a GPU.


TOP_LOGPROBS = 1024
"""What vLLM is told it may be asked for: its own default allows 20."""


class VllmEngine(Engine):
    """vLLM's synchronous engine: requests are added as others end, one step after the other."""

    name = "vllm"

    def __init__(
        self,
        model: Path,
        adapter: Path | None,
        *,
        device: str,
        dtype: str,
        batch_size: int | None,
        max_length: int | None = None,
        vllm: Any = None,
    ) -> None:
        """`vllm` stands in for the package in tests."""
        if adapter is not None:
            raise UsageError(
                "the vllm engine takes a merged model, not an adapter",
                where=adapter,
                remedy="merge it first (lorasmith merge), or give --engine transformers",
            )
        if not device.startswith(("auto", "cuda")):
            raise UsageError(f"the vllm engine does not run on {device!r}", expected="auto or cuda")
        self.vllm = vllm or _import_vllm()
        self.folder = model
        self.dtype = resolve_dtype(model, dtype, "cuda")
        self.tokenizer = load_tokenizer(model)
        self.in_flight = batch_size or 4 * SLOTS_GPU
        arguments = self.vllm.EngineArgs(
            model=str(model),
            tokenizer=str(model),
            dtype=self.dtype,
            max_model_len=max_length,
            max_num_seqs=self.in_flight,
            max_logprobs=TOP_LOGPROBS,
            trust_remote_code=False,
            enable_prefix_caching=False,  # its last digits differ: rows would depend on others
            generation_config="vllm",  # the folder's own sampling settings must not mix in
        )
        self.engine = self.vllm.LLMEngine.from_engine_args(arguments)
        self.room = int(self.engine.model_config.max_model_len)
        self.context = self.room

    def stops(self, template: str) -> frozenset[int]:
        file = self.folder / "generation_config.json"
        eos = read_object(file, CheckpointError).get("eos_token_id") if file.is_file() else None
        return frozenset(ending_tokens(self.tokenizer, eos, template))

    def answers(
        self,
        requests: Iterable[Request],
        limits: GenerationLimits,
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[GeneratedAnswer]:
        waiting = iter(requests)
        under_way: dict[str, Request] = {}
        counts: dict[str, int] = {}
        while True:
            for request in islice(waiting, self.in_flight - len(under_way)):
                if not 0 < len(request.tokens) < self.room:
                    reason = (
                        f"the prompt has {len(request.tokens):,} tokens, the model room for {self.room:,}"
                    )
                    yield GeneratedAnswer(request.index, [], "failed", error=reason)
                    continue
                name = str(request.index)
                parameters = self._parameters(request, limits, sampling)
                self.engine.add_request(name, {"prompt_token_ids": list(request.tokens)}, parameters)
                under_way[name] = request
            if not under_way:
                break
            for output in self.engine.step():
                made = output.outputs[0]
                # Each step gives all tokens so far: what is new is the difference.
                on_tokens(len(made.token_ids) - counts.get(output.request_id, 0))
                counts[output.request_id] = len(made.token_ids)
                if output.finished:
                    del counts[output.request_id]
                    yield self._answer(under_way.pop(output.request_id), made, limits)

    def _parameters(self, request: Request, limits: GenerationLimits, sampling: Sampling) -> Any:
        room = self.room - len(request.tokens)
        return self.vllm.SamplingParams(
            max_tokens=min(limits.max_new_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=None if sampling.greedy else request.seed % (1 << 63),
            stop_token_ids=sorted(limits.stop),
            logprobs=limits.top_logprobs or None,
            detokenize=False,
        )

    def _answer(self, request: Request, made: Any, limits: GenerationLimits) -> GeneratedAnswer:
        tokens = [int(token) for token in made.token_ids]
        if made.finish_reason not in ("stop", "length"):
            return GeneratedAnswer(
                request.index, [], "failed", error=f"vLLM ended the row with {made.finish_reason!r}"
            )
        end = tokens.pop() if made.finish_reason == "stop" and tokens and tokens[-1] in limits.stop else None
        finish = made.finish_reason
        # vLLM says "length" both at the limit that was asked for and where the context is full.
        if finish == "length" and len(tokens) < limits.max_new_tokens:
            finish = "context"
        answer = GeneratedAnswer(request.index, tokens, finish, end)
        if limits.top_logprobs:
            _keep_logprobs(answer, made, limits.top_logprobs)
        return answer


def _keep_logprobs(answer: GeneratedAnswer, made: Any, count: int) -> None:
    """Keep each place's log-probabilities: vLLM gives the likeliest, and the chosen token besides."""
    for token, place in zip(made.token_ids, made.logprobs, strict=True):
        best = sorted(((-entry.logprob, int(key)) for key, entry in place.items()))[:count]
        answer.logprobs.append(float(place[token].logprob))
        answer.top.append(([key for _, key in best], [-value for value, _ in best]))


def _import_vllm() -> Any:
    try:
        return import_module("vllm")
    except ImportError as error:
        raise MachineError(
            f"the vllm engine is not installed ({error})",
            remedy="pip install 'lorasmith[vllm]' on a machine with a GPU, or give --engine transformers",
        ) from error
