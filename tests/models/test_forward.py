"""Log-probabilities of any architecture, against its own full logits and a plain float64 loop."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lorasmith.errors import CheckpointError
from lorasmith.models.batches import halve, make_batch, plan_batches
from lorasmith.models.device import choose_route
from lorasmith.models.forward import TokenForward
from lorasmith.models.load import LoadedModel
from lorasmith.models.scoring import Floats, open_forward, score_states
from lorasmith.models.text import Encoded
from tests.tiny import tiny_model

CPU = torch.device("cpu")
ROUTE = choose_route("mkl", CPU)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gemma2, capped logits": {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 3.0},
    "granite, divided logits": {"model_type": "granite", "logits_scaling": 3.0},
    "cohere, scaled logits": {"model_type": "cohere", "logit_scale": 0.25},
    "qwen3, head norms": {"model_type": "qwen3", "head_dim": 8},
    "mixtral, experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral, window": {"model_type": "mistral", "sliding_window": 6},
}


def random_rows(count: int, *, seed: int = 0, longest: int = 40) -> list[Encoded]:
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(generator.integers(4, longest))
        start = int(generator.integers(1, length - 1))
        ids = generator.integers(5, 300, size=length).tolist()
        rows.append(Encoded.behind(ids, start))
    return rows


def loaded(model: PreTrainedModel) -> LoadedModel:
    return LoadedModel(model, None, type(model).__name__, 0, 300, None, CPU)


def score_all(model: PreTrainedModel, rows: list[Encoded], batch_tokens: int = 4096) -> list[Floats]:
    found: dict[int, Floats] = {}
    with open_forward(loaded(model), rows, ROUTE) as forward:
        for batch in plan_batches([len(row.ids) for row in rows], batch_tokens):
            names = [str(i) for i in range(len(rows))]
            found.update(zip(batch, score_states(forward, make_batch(batch, rows), names)[0], strict=True))
    return [found[i] for i in range(len(rows))]


def plain_loop(model: PreTrainedModel, rows: list[Encoded]) -> list[np.ndarray]:
    """One row at a time, full logits, float64: the definition."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"  # the grouped product of torch knows no float64
    result = []
    with torch.no_grad():
        for row in rows:
            logprobs = torch.log_softmax(exact(torch.tensor([row.ids])).logits[0].double(), -1)
            result.append(np.array([float(logprobs[i - 1, row.ids[i]]) for i in row.scored_at]))
    return result


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_token_logprobs_match_a_plain_float64_loop(name: str) -> None:
    model = tiny_model(**ARCHITECTURES[name])
    rows = random_rows(12)
    # float32 through two layers with logits up to some tens: 1e-5; a forgotten cap or factor shifts by 0.1.
    for found, expected in zip(score_all(model, rows), plain_loop(model, rows), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-5)


def test_a_row_does_not_depend_on_its_company() -> None:
    model = tiny_model()
    rows = random_rows(40)
    order = np.random.default_rng(3).permutation(len(rows))
    layouts = [
        score_all(model, rows),
        score_all(model, rows, batch_tokens=64),
        score_all(model, rows, batch_tokens=1),
    ]
    shuffled = score_all(model, [rows[i] for i in order], batch_tokens=200)
    layouts.append([shuffled[int(np.flatnonzero(order == i)[0])] for i in range(len(rows))])
    for layout in layouts[1:]:
        for first, other in zip(layouts[0], layout, strict=True):
            # Other batches mean other blocks in the products, thus other roundings in the last digits: some
            # 1e-6 in a logit of 10. A mean over the tokens of a row averages most of it out.
            assert float(np.abs(first - other).max()) < 1e-4
            assert abs(first.mean(dtype=np.float64) - other.mean(dtype=np.float64)) < 1e-6


def test_padding_and_what_it_holds_changes_nothing() -> None:
    model = tiny_model()
    rows = random_rows(3)
    with open_forward(loaded(model), rows, ROUTE) as forward:
        narrow = make_batch([0, 1, 2], rows)
        wide = make_batch([0, 1, 2], rows, pad_to=90)
        behind = torch.arange(wide.ids.shape[1]) >= wide.lengths[:, None]
        wide.ids[behind] = 77
        one, two = forward.hidden(narrow), forward.hidden(wide)
    torch.testing.assert_close(one, two, rtol=0, atol=2e-6)


class Shifted(torch.nn.Module):
    """A causal model whose logits pass through a step that its config does not tell of."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner
        self.config, self.dtype = inner.config, inner.dtype

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        output = self.inner(input_ids=input_ids, use_cache=use_cache)
        output.logits = torch.asinh(output.logits) * 2
        return output


def test_an_unknown_finish_is_noticed_and_the_models_own_is_used() -> None:
    model: Any = Shifted(tiny_model())
    rows = random_rows(6)
    with open_forward(loaded(model), rows, ROUTE) as forward:
        assert forward.finish == "own finish"
    for found, expected in zip(score_all(model, rows), plain_loop(model, rows), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-5)


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.set_attn_implementation("sdpa")
    with pytest.raises(CheckpointError, match="not causal"):
        score_all(model, random_rows(4))


def test_non_finite_logits_name_the_row_and_the_first_layer() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj") as caught:
        score_all(model, random_rows(4))
    assert "example '" in caught.value.message()


def test_the_hook_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        before = model(ids).logits
        with TokenForward(model, CPU):
            pass
        score_all(model, random_rows(3))
        after = model(ids).logits
    assert before.shape == after.shape == (1, 10, 300)
    assert torch.equal(before, after)


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [3, 50, 9, 9, 20, 1, 500, 7]
    batches = plan_batches(lengths, 60)
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    assert batches[0] == (6,)  # longer than the budget: alone
    for batch in batches[1:]:
        assert len(batch) * max(lengths[row] for row in batch) <= 60
    assert halve((4, 5, 6)) == [(4,), (5, 6)]
    assert halve((4,)) == []
