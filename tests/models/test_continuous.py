"""Continuous batching: neighbours, joins and moves of the cache change no answer; failures are said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from lorasmith.models.device import choose_route, use_route
from lorasmith.models.generation import continuous
from lorasmith.models.generation.continuous import generate_continuously
from lorasmith.models.generation.decoding import GeneratedAnswer, GenerationLimits, Request, Sampling
from lorasmith.models.load import LoadedModel
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
MKL = choose_route("mkl", CPU)
RECURRENT: dict[str, Any] = {
    "model_type": "mamba",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
}


def loaded(name: str = "llama", context: int | None = 256, **settings: Any) -> LoadedModel:
    return LoadedModel(tiny_model(name, **settings), tiny_tokenizer(), "x", 0, 300, context, CPU)


def prompts(count: int = 12, longest: int = 60) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [
        generator.integers(5, 290, size=int(generator.integers(1, longest))).tolist() for _ in range(count)
    ]


def requests(texts: list[list[int]]) -> list[Request]:
    return [Request(index, text, seed=index) for index, text in enumerate(texts)]


def run(
    model: LoadedModel,
    asked: Iterable[Request],
    *,
    most: int = 20,
    stop: Iterable[int] = (),
    top: int = 0,
    **options: Any,
) -> dict[int, GeneratedAnswer]:
    limits = GenerationLimits(most, frozenset(stop), top)
    with use_route(MKL):
        answers = list(generate_continuously(model, asked, limits, **options))
    assert len({answer.index for answer in answers}) == len(answers)
    return {answer.index: answer for answer in answers}


def plain_generate(model: LoadedModel, prompt: list[int], most: int, stop: list[int]) -> list[int]:
    """transformers' own `generate`, one prompt at a time."""
    with use_route(MKL):
        made = model.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=stop or None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
    return made[:-1] if made[-1] in stop else made


# 21 stop tokens out of 300: answers end by themselves after about 14 tokens, each at another step.
STOPS = list(range(5, 300, 14))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "llava"])
def test_answers_are_those_of_plain_generate_for_every_architecture(name: str) -> None:
    model = loaded(name, sliding_window=16) if name == "mistral" else loaded(name)
    found = run(model, requests(prompts()), stop=STOPS, slots=3)
    for index, prompt in enumerate(prompts()):
        assert found[index].tokens == plain_generate(model, prompt, 20, STOPS), index
        ended = len(found[index].tokens) < 20
        assert found[index].finish == ("stop" if ended else "length")
        assert (found[index].end in STOPS) == ended


def test_rows_of_very_different_lengths_move_the_cache_and_change_nothing() -> None:
    model = loaded(max_position_embeddings=512, context=512)
    texts = [[7] * 3, [8, 9] * 150, *prompts(6), [11] * 200, [12] * 2]
    found = run(model, requests(texts), most=90, stop=[17], slots=3)
    for index, prompt in enumerate(texts):
        assert found[index].tokens == plain_generate(model, prompt, 90, [17]), index


def test_a_recurrent_model_is_generated_row_by_row() -> None:
    model = loaded("llama", **RECURRENT)
    found = run(model, requests(prompts(4)), most=8, slots=3)
    for index, prompt in enumerate(prompts(4)):
        assert found[index].tokens == plain_generate(model, prompt, 8, [])


def test_a_finished_row_makes_room_at_once() -> None:
    """Fewer steps than padded batches take: a slot is never held by a row that has ended."""
    model = loaded()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    texts = prompts(12)
    whole = {index: plain_generate(model, text, 20, []) for index, text in enumerate(texts)}
    model.model.register_forward_pre_hook(count)

    def asked() -> Iterator[Request]:
        yield from requests(texts)

    found = run(model, asked(), stop=STOPS, slots=4)
    tokens = sum(len(answer.tokens) + (answer.end is not None) for answer in found.values())
    padded = sum(
        max(len(found[index].tokens) + 1 for index in range(start, start + 4)) for start in range(0, 12, 4)
    )
    joins = 12  # at most one forward a join
    assert calls <= tokens / 4 + joins + 20
    assert calls - joins < padded
    assert all(found[index].tokens == text[: len(found[index].tokens)] for index, text in whole.items())


def test_sampled_answers_do_not_depend_on_the_neighbours() -> None:
    model = loaded()
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=1)
    together = run(model, requests(prompts()), sampling=sampling, slots=5)
    for request in requests(prompts()):
        assert run(model, [request], sampling=sampling)[request.index] == together[request.index]
    greedy = run(model, requests(prompts()), slots=5)
    assert any(greedy[index].tokens != together[index].tokens for index in greedy)
    again = run(model, [Request(0, prompts()[0], seed=99)], sampling=sampling)
    assert again[0].tokens != together[0].tokens


def test_log_probabilities_are_those_of_a_forward_over_the_whole_text() -> None:
    model = loaded()
    found = run(model, requests(prompts()), stop=STOPS, top=5, slots=3)
    for index, prompt in enumerate(prompts()):
        answer = found[index]
        chosen = [*answer.tokens, *([answer.end] if answer.end is not None else [])]
        with use_route(MKL):
            logits = model.model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
        every = logits.log_softmax(-1)
        # Two float32 forwards of these models differ by less than 1e-5 nats through their order of summation.
        assert answer.logprobs == pytest.approx([float(every[i, t]) for i, t in enumerate(chosen)], abs=1e-4)
        for place, (tokens, values) in enumerate(answer.top):
            best = every[place].topk(5)
            assert tokens == best.indices.tolist()
            assert values == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_prompt_without_room_fails_and_the_models_own_limit_is_named() -> None:
    model = loaded(context=40)
    texts = [[7] * 40, [7] * 36, [], [7, 400]]
    found = run(model, requests(texts), most=20)
    assert "40 tokens" in found[0].error
    assert (found[1].finish, len(found[1].tokens)) == ("context", 4)
    assert "no tokens" in found[2].error
    assert "token 400" in found[3].error


def test_too_little_memory_makes_fewer_rows_and_the_same_answers() -> None:
    model = loaded()
    forward = continuous._Batch._forward
    refused = 0

    def limited(self: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal refused
        if ids.shape[0] > 2:
            refused += 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, ids, *rest)

    whole = run(model, requests(prompts()), stop=STOPS, slots=6)
    with patch.object(continuous._Batch, "_forward", limited):
        found = run(model, requests(prompts()), stop=STOPS, slots=6)
    assert refused
    assert found == whole


def test_a_row_that_never_fits_fails_alone() -> None:
    model = loaded()
    forward = continuous._Batch._forward

    def limited(self: Any, ids: torch.Tensor, mask: torch.Tensor, *rest: Any) -> torch.Tensor:
        if int(mask.sum(-1).max()) > 65:
            raise RuntimeError("out of memory")
        return forward(self, ids, mask, *rest)

    texts = [*prompts(5, longest=40), [9] * 60, [9] * 100]
    whole = run(model, requests(texts), most=10)
    with patch.object(continuous._Batch, "_forward", limited):
        found = run(model, requests(texts), most=10)
    assert {index for index, answer in found.items() if answer.finish == "failed"} == {5, 6}
    assert "too little memory" in found[5].error
    assert all(found[index] == whole[index] for index in range(5))


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    model = loaded()
    with (
        patch.object(continuous._Batch, "_forward", side_effect=RuntimeError("a bug")),
        pytest.raises(RuntimeError, match="a bug"),
    ):
        run(model, requests(prompts(2)))
