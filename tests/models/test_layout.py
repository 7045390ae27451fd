"""Packed rows give what each of them gives alone; an architecture that cannot be packed is noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lorasmith.models import forward as tree_attention
from lorasmith.models.batches import make_pack
from lorasmith.models.device import use_route
from lorasmith.models.forward import TokenForward
from lorasmith.models.layout import PACKED, PADDED, choose_layout, lay_out, plan_rows
from lorasmith.models.scoring import Floats, open_forward, score_states
from lorasmith.models.text import Encoded
from tests.models.test_forward import CPU, ROUTE, loaded, plain_loop
from tests.tiny import ARCHITECTURES, tiny_model


def alike_rows(count: int = 14, *, longest: int = 60) -> list[Encoded]:
    """Rows of which several begin alike, at two depths, and one is another's beginning."""
    generator = np.random.default_rng(5)

    def some(length: int) -> list[int]:
        return generator.integers(5, 300, size=length).tolist()

    head = some(17)
    questions = [head + some(longest // 2) for _ in range(3)]
    rows = [questions[place % 3] + some(int(generator.integers(2, 12))) for place in range(count - 2)]
    rows += [rows[0] + some(3), some(9)]
    return [Encoded.behind(ids, max(1, len(ids) - 12)) for ids in rows]


def score_all(
    model: PreTrainedModel, rows: list[Encoded], layout: str, batch_tokens: int = 300
) -> list[Floats]:
    found: dict[int, Floats] = {}
    names = [str(row) for row in range(len(rows))]
    with open_forward(loaded(model), rows, ROUTE) as forward:
        for batch in plan_rows(rows, layout, batch_tokens):
            found.update(
                zip(batch, score_states(forward, lay_out(batch, rows, layout), names)[0], strict=True)
            )
    return [found[row] for row in range(len(rows))]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_gives_the_float64_loop_packed_or_not(name: str) -> None:
    model = tiny_model(**ARCHITECTURES[name])
    rows = alike_rows()
    layout, reason = choose_layout(loaded(model), rows, ROUTE)
    assert bool(reason) == (layout == PADDED)
    for found, expected in zip(score_all(model, rows, layout), plain_loop(model, rows), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-5)


def test_the_usual_decoders_are_packed() -> None:
    rows = alike_rows()
    for name in ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "qwen3-moe", "phi3"):
        assert choose_layout(loaded(tiny_model(**ARCHITECTURES[name])), rows, ROUTE) == (PACKED, ""), name


def test_long_rows_are_attended_to_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    rows = alike_rows(6, longest=400)
    assert max(len(row.ids) for row in rows) > 1.5 * tree_attention.BLOCK
    whole = score_all(model, rows, PACKED, batch_tokens=2000)
    for found, expected in zip(whole, plain_loop(model, rows), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-5)
    monkeypatch.setattr(tree_attention, "BLOCK", 7)
    for found, expected in zip(score_all(model, rows, PACKED), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_row_does_not_depend_on_what_it_is_packed_with() -> None:
    model = tiny_model()
    rows = alike_rows(30)
    first = score_all(model, rows, PADDED, batch_tokens=64)
    for budget in (1, 100, 5000):
        for one, other in zip(first, score_all(model, rows, PACKED, budget), strict=True):
            # Rounding in other blocks: see test_forward, where rows are padded.
            assert float(np.abs(one - other).max()) < 1e-4
            assert abs(one.mean(dtype=np.float64) - other.mean(dtype=np.float64)) < 1e-6


def test_the_kernel_of_other_devices_and_types_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    rows = alike_rows()
    blocks = score_all(model, rows, PACKED)
    monkeypatch.setattr(tree_attention, "_computes_in_blocks", lambda query: False)
    for one, other in zip(blocks, score_all(model, rows, PACKED), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "mistral", "sliding_window": 6}, "looks back over 6 tokens"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 2]], "num_layers": 2}, ""),
        ({"model_type": "mamba", "state_size": 4}, ""),
        ({"model_type": "bloom", "n_layer": 2, "n_head": 4}, ""),
    ],
    ids=["window", "own attention", "state space", "positions in the scores"],
)
def test_what_cannot_be_packed_is_padded_and_says_why(settings: dict[str, Any], reason: str) -> None:
    model = tiny_model(**settings)
    layout, why = choose_layout(loaded(model), alike_rows(), ROUTE)
    assert layout == PADDED
    assert why
    assert reason in why


def test_a_layer_that_mixes_neighbours_in_the_pack_is_noticed() -> None:
    """A convolution over tokens beside attention in every layer."""
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda hidden: (
        plain(hidden) + 0.5 * torch.roll(hidden, 1, 1) * (torch.arange(hidden.shape[1]) > 0)[:, None]
    )
    layout, reason = choose_layout(loaded(model), alike_rows(), ROUTE)
    assert (layout, "alone" in reason) == (PADDED, True)


def test_a_window_as_long_as_the_rows_is_no_obstacle() -> None:
    model = tiny_model(model_type="mistral", sliding_window=100)
    rows = alike_rows()
    assert choose_layout(loaded(model), rows, ROUTE) == (PACKED, "")
    for found, expected in zip(score_all(model, rows, PACKED), plain_loop(model, rows), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-5)


def test_the_models_own_attention_is_back_afterwards() -> None:
    model = tiny_model()
    rows = alike_rows(4)
    before = model.config._attn_implementation
    with use_route(ROUTE), TokenForward(model, CPU) as forward:
        forward.hidden(make_pack(range(4), rows))
        assert model.config._attn_implementation == before
