"""A model spread over several places gives the numbers of one in a single place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lorasmith.errors import MemoryLimitError, UsageError
from lorasmith.followup.responses.respond import respond
from lorasmith.models.batches import make_batch
from lorasmith.models.device import choose_route, use_route
from lorasmith.models.generation.continuous import generate_continuously
from lorasmith.models.generation.decoding import GeneratedAnswer, GenerationLimits, Request
from lorasmith.models.generation.generate import generate_greedy
from lorasmith.models.load import DeviceMap, load_model
from lorasmith.models.scoring import open_forward, score_states
from lorasmith.models.text import Encoded
from lorasmith.options import RespondOptions
from lorasmith.proving.behaviour.compare import compare
from lorasmith.scoring.validate import validate
from tests.tiny import save_adapter, save_base, tiny_rows

CPU = torch.device("cpu")
ROWS = [Encoded.behind([5, 9, 17, 40, 33, 21], 2), Encoded.behind([8, 9, 10], 1)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spread")
    save_base(folder / "base")
    save_adapter(folder / "adapter", folder / "base")
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(6)))
    return folder


def scores(place: Path, device_map: DeviceMap) -> tuple[list[np.ndarray], list[int]]:
    loaded = load_model(place / "base", device_map=device_map)
    with open_forward(loaded, ROWS, choose_route("mkl", CPU)) as forward:
        found = score_states(forward, make_batch([0, 1], ROWS), ["a", "b"])[0]
        [text] = generate_greedy(loaded, [ROWS[0].ids], max_new_tokens=5, stop=[2])
    return found, text.tokens


SPREAD: DeviceMap = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def test_layers_on_disk_change_no_number(place: Path) -> None:
    (whole, text), (parts, other) = scores(place, None), scores(place, SPREAD)
    for one, two in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, two)
    assert text == other


def answers(place: Path, device_map: DeviceMap) -> list[GeneratedAnswer]:
    loaded = load_model(place / "base", device_map=device_map)
    requests = [Request(index, [5 + index, 9, 17, 40][: 2 + index % 3]) for index in range(5)]
    limits = GenerationLimits(max_new_tokens=8, stop=frozenset([2]), top_logprobs=2)
    with use_route(choose_route("mkl", CPU)):
        found = generate_continuously(loaded, requests, limits, slots=2)
        return sorted(found, key=lambda answer: answer.index)


def test_layers_on_disk_change_no_answer(place: Path) -> None:
    whole, spread = answers(place, None), answers(place, SPREAD)
    assert [answer.tokens for answer in spread] == [answer.tokens for answer in whole]
    assert sum(len(answer.tokens) for answer in whole) > 20
    for one, two in zip(whole, spread, strict=True):
        # Where a weight lies in memory may change the last digit of a product.
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-5)


def test_respond_spreads_a_model(place: Path, tmp_path: Path) -> None:
    options = RespondOptions(template="plain", max_new_tokens=6)
    one = respond(place / "base", place / "test.jsonl", tmp_path / "a.jsonl", options=options)
    spread = options.model_copy(update={"device_map": "auto"})
    two = respond(place / "base", place / "test.jsonl", tmp_path / "b.jsonl", options=spread)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert one.settings == two.settings
    for wrong in ({"device_map": "sideways"}, {"device_map": "auto", "engine": "vllm"}):
        with pytest.raises(UsageError, match=r"device.map"):
            respond(place / "base", place / "test.jsonl", tmp_path / "c.jsonl", **wrong)


def test_an_adapter_on_a_model_that_is_not_all_there_is_one_message(place: Path) -> None:
    with pytest.raises(MemoryLimitError, match="an adapter needs all of it"):
        load_model(place / "base", adapter=place / "adapter", device_map=SPREAD)


def test_the_public_functions_spread_a_model(place: Path, tmp_path: Path) -> None:
    options = {"adapter": place / "adapter", "arithmetic": "mkl"}
    one = validate(place / "base", place / "test.jsonl", tmp_path / "a", **options)
    two = validate(place / "base", place / "test.jsonl", tmp_path / "b", **options, device_map="auto")
    assert one.overall == two.overall
    assert (one.settings.device_map, two.settings.device_map) == (None, "auto")
    folders = (place / "base", place / "adapter", place / "base", place / "test.jsonl")
    assert compare(*folders, device_map="auto", arithmetic="mkl").overall.loss_a == pytest.approx(
        one.overall.loss, abs=1e-6
    )
    with pytest.raises(UsageError, match="sideways"):
        validate(place / "base", place / "test.jsonl", tmp_path, device_map="sideways")
