"""The vLLM engine (extra `vllm`, for GPUs): tested against a stand-in of its interface, not on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from lorasmith.checkpoint.jsonfile import read_object
from lorasmith.errors import CheckpointError, MachineError, UsageError
from lorasmith.followup.respond_engines import SLOTS_GPU, Engine, resolve_dtype
from lorasmith.models.generate import ending_tokens
from lorasmith.models.load import load_tokenizer
from lorasmith.models.requests import Answer, Limits, Request
from lorasmith.models.sampling import Sampling

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
        limits: Limits,
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[Answer]:
        waiting = iter(requests)
        under_way: dict[str, Request] = {}
        counts: dict[str, int] = {}
        while True:
            for request in islice(waiting, self.in_flight - len(under_way)):
                if not 0 < len(request.tokens) < self.room:
                    reason = (
                        f"the prompt has {len(request.tokens):,} tokens, the model room for {self.room:,}"
                    )
                    yield Answer(request.index, [], "failed", error=reason)
                    continue
                name = str(request.index)
                parameters = self._parameters(request, limits, sampling)
                self.engine.add_request(name, {"prompt_token_ids": list(request.tokens)}, parameters)
                under_way[name] = request
            if not under_way:
                break
            for output in self.engine.step():
                made = output.outputs[0]
                on_tokens(len(made.token_ids) - counts.get(output.request_id, 0))
                counts[output.request_id] = len(made.token_ids)
                if output.finished:
                    del counts[output.request_id]
                    yield self._answer(under_way.pop(output.request_id), made, limits)

    def _parameters(self, request: Request, limits: Limits, sampling: Sampling) -> Any:
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

    def _answer(self, request: Request, made: Any, limits: Limits) -> Answer:
        tokens = [int(token) for token in made.token_ids]
        if made.finish_reason not in ("stop", "length"):
            return Answer(
                request.index, [], "failed", error=f"vLLM ended the row with {made.finish_reason!r}"
            )
        end = tokens.pop() if made.finish_reason == "stop" and tokens and tokens[-1] in limits.stop else None
        finish = made.finish_reason
        if finish == "length" and len(tokens) < limits.max_new_tokens:
            finish = "context"
        answer = Answer(request.index, tokens, finish, end)
        if limits.top_logprobs:
            _keep_logprobs(answer, made, limits.top_logprobs)
        return answer


def _keep_logprobs(answer: Answer, made: Any, count: int) -> None:
    """From vLLM's `token id -> Logprob` of each place, where the chosen token may be one more."""
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
