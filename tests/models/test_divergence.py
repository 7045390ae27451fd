"""Numbers per token of two models, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorasmith.models.scoring import token_logprobs
from lorasmith.models.statistics import TokenPairs, compare_logits, kl_divergence


def exact_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    p, q = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("scale", [3.0, 0.3, 1e-2, 1e-3, 1e-4, 1e-5])
def test_kl_keeps_its_digits_down_to_1e_12(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 5000, generator=generator) * 4
    b = a + torch.randn(64, 5000, generator=generator) * scale
    found, expected = kl_divergence(a, b).double(), exact_kl(a, b)
    assert float(expected.mean()) == pytest.approx(scale**2 / 2, rel=0.5) or scale > 1
    # At a difference of 1e-5 the float64 reference itself cancels to about 1e-16 / 5e-11.
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-15)
    assert (found >= 0).all()


def test_equal_logits_and_a_constant_shift_have_no_divergence() -> None:
    a = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(a, a.clone()).abs().max() == 0
    assert kl_divergence(a, a + 2.0).max() < 1e-12


def test_token_logprobs_match_float64_for_large_logits() -> None:
    logits = torch.randn(32, 1000, generator=torch.Generator().manual_seed(1)) * 30 + 200
    targets = torch.arange(32)
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(32), targets]
    torch.testing.assert_close(token_logprobs(logits, targets).double(), expected, rtol=1e-6, atol=2e-6)


def test_choices_and_margins() -> None:
    a = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.5]])
    b = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.5, 2.0]])
    pairs = compare_logits(a, b, torch.tensor([0, 1]))
    assert pairs.top_a.tolist() == [0, 1]
    assert pairs.top_b.tolist() == [0, 2]
    assert pairs.margin.tolist() == [0.0, 0.5]
    assert pairs.logprob_a[0] == pairs.logprob_b[0]
    both = TokenPairs.join([pairs, pairs.part(slice(1, 2))])
    assert len(both) == 3
    np.testing.assert_array_equal(both.top_b, [0, 2, 2])
