"""Products in another order of summation: the same within float32, and rounded independently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasmith.models import reordered
from lorasmith.models.device import float32_routes, use_route
from lorasmith.models.reordered import ReorderedSums
from tests.tiny import save_base

CPU = torch.device("cpu")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w, b: torch.nn.functional.linear(x, w.T, b),
        lambda x, w, b: torch.nn.functional.linear(x, weight=w.T, bias=b),
        lambda x, w, b: x @ w + b,
        lambda x, w, b: torch.matmul(x, w) + b,
        lambda x, w, b: torch.mm(x, w) + b,
        lambda x, w, b: torch.bmm(x[None], w[None])[0] + b,
        lambda x, w, b: torch.addmm(b, x, w),
        lambda x, w, b: torch.addmm(input=b, mat1=x, mat2=w),
        lambda x, w, b: torch.baddbmm(b.expand(1, len(x), len(b)), x[None], w[None])[0],
        lambda x, w, b: x @ w[:, 0],
    ],
)
def test_every_kind_of_product_stays_what_it_is(product: Product) -> None:
    x, w, b = draw(40, 96), draw(96, 64), draw(64)
    with ReorderedSums():
        found = product(x, w, b)
    wanted = product(x.double(), w.double(), b.double())
    # 96 terms of about 1: float32 leaves some 1e-6; one term in a wrong place would be off by 1.
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("inner", [64, 576, 1536])
def test_the_order_is_another_draw_of_the_same_rounding_on_every_route(inner: int) -> None:
    x, w = draw(256, inner), draw(512, inner)
    exact = x.double() @ w.double().T
    for route in float32_routes(CPU):
        with use_route(route):
            plain = torch.nn.functional.linear(x, w)
            with ReorderedSums():
                other = torch.nn.functional.linear(x, w)
        error, its_error, apart = (
            float(difference.double().pow(2).mean().sqrt())
            for difference in (plain - exact, other - exact, plain - other)
        )
        # No worse than the kernel itself, and independent of it: variances of independent errors add up.
        assert its_error == pytest.approx(error, rel=0.1), route
        assert 1.2 < apart / error < 1.6, route


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "qwen3-moe", "gemma3"])
def test_a_model_gives_the_same_logits_in_other_rounding_and_is_left_as_it_was(
    architecture: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        save_base(tmp_path / "base", architecture), dtype=torch.float32
    ).eval()
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        with ReorderedSums():
            other = model(input_ids=ids, use_cache=False).logits
        after = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(before, after)
    changed = float((before != other).float().mean())
    assert changed > 0.5  # hardly a logit keeps its last bit
    # Two layers of float32; a product with factors in different orders would be off by its own size.
    torch.testing.assert_close(other, before, rtol=0, atol=1e-4 * float(before.abs().max()))


def test_a_large_layer_is_copied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = draw(5, 32), draw(100, 32), draw(100)
    with ReorderedSums():
        whole = torch.nn.functional.linear(x, w, b)
    monkeypatch.setattr(reordered, "_COPIED", 32 * 7)
    copied = []
    along = reordered._along

    def watched(tensor: torch.Tensor, dim: int, order: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.numel())
        return along(tensor, dim, order)

    monkeypatch.setattr(reordered, "_along", watched)
    with ReorderedSums():
        pieces = torch.nn.functional.linear(x, w, b)
    assert max(copied) <= 32 * 7
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)  # kernels differ by the number of outputs
