"""Greedy generation: batches change nothing, the folder's own settings are not used, stops are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorasmith.models.device import choose_route, use_route
from lorasmith.models.generation.generate import (
    from_arrays,
    generate_greedy,
    plan_generation,
    stop_tokens,
    to_arrays,
)
from lorasmith.models.load import LoadedModel
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama, rotary": {},
    "gpt2, learned positions": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
    },
    "mistral, window": {"model_type": "mistral", "sliding_window": 6},
}


def loaded(**settings: Any) -> LoadedModel:
    model = tiny_model(**settings)
    return LoadedModel(model, tiny_tokenizer(), "x", 0, 300, None, CPU)


def prompts(count: int = 7) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(5, 300, size=int(generator.integers(2, 30))).tolist() for _ in range(count)]


def likeliest(model: Any, prompt: list[int], steps: int) -> list[int]:
    """The definition: the whole text through the model at every step, no cache, no padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_of_mixed_lengths_gives_what_each_prompt_gives_alone(name: str) -> None:
    model = loaded(**ARCHITECTURES[name])
    with use_route(choose_route("mkl", CPU)):
        found = generate_greedy(model, prompts(), max_new_tokens=12, stop=[])
    for prompt, text in zip(prompts(), found, strict=True):
        assert text.tokens == likeliest(model.model, prompt, 12)
        assert not text.finished


def test_a_stop_token_ends_one_row_and_not_the_others() -> None:
    model = loaded()
    whole = [likeliest(model.model, prompt, 12) for prompt in prompts()]
    stop = whole[0][3]
    with use_route(choose_route("mkl", CPU)):
        found = generate_greedy(model, prompts(), max_new_tokens=12, stop=[stop])
    for text, all_tokens in zip(found, whole, strict=True):
        expected = all_tokens[: all_tokens.index(stop)] if stop in all_tokens else all_tokens
        assert text.tokens == expected
        assert text.finished == (stop in all_tokens)


def test_sampling_and_penalties_of_the_folder_are_not_used() -> None:
    model = loaded()
    before = likeliest(model.model, prompts()[0], 8)
    model.model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=4
    )
    with use_route(choose_route("mkl", CPU)):
        assert generate_greedy(model, prompts()[:1], max_new_tokens=8, stop=[])[0].tokens == before


def test_a_stop_text_ends_a_row() -> None:
    model = loaded()
    tokens = likeliest(model.model, prompts()[0], 12)
    end = model.tokenizer.decode(tokens[4:6])
    with use_route(choose_route("mkl", CPU)):
        [text] = generate_greedy(model, prompts()[:1], max_new_tokens=12, stop=[], stop_texts=[end])
    assert text.finished
    assert end in model.tokenizer.decode(text.tokens)
    assert len(text.tokens) <= 6


def test_the_templates_end_token_stops_beside_the_folders_eos() -> None:
    model = loaded()
    model.model.generation_config.eos_token_id = [2, 7]
    end = model.tokenizer.convert_tokens_to_ids("<|end|>")
    assert stop_tokens(model, "chat") == sorted({2, 7, end})


def test_prompts_of_like_length_go_together_and_results_survive_the_journal() -> None:
    planned = plan_generation([[1] * n for n in (3, 9, 5, 7)], rows=2)
    assert planned == [(1, 3), (2, 0)]
    with use_route(choose_route("mkl", CPU)):
        found = generate_greedy(loaded(), prompts(3), max_new_tokens=4, stop=[])
    assert from_arrays((0, 1, 2), to_arrays(found)) == found
