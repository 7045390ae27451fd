"""Matrix products whose terms are added in another order, on any device and by any route.

A sum in float32 depends on its order, and no order is the right one: a kernel chooses it by the shapes, the
processor and the number of threads. Permuting the inner dimension of both factors leaves the product as it
is and makes the kernel add the same terms in another order. So the difference between two such forwards is
what float32 itself leaves open, however few routes the library offers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_COPIED = 1 << 24
"""Largest number of weights that a linear layer has copied at one time: 64 MB in float32, where a head may
have gigabytes."""

_PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.nn.functional.grouped_mm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.mm,
    torch.Tensor.bmm,
}
"""What experts, and attention without a kernel of its own, call with both factors."""

_ADDED_PRODUCTS = {torch.addmm, torch.baddbmm}
"""What convolutions of width 1 (GPT-2) call with a summand and both factors."""


class ReorderedSums(TorchFunctionMode):
    """Inside the block every product of matrices adds its terms in an order drawn for its inner dimension.

    A product that is called in another way keeps its order; its factors come from products before it, whose
    rounding is another already.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        rest = kwargs or {}
        if func is torch.nn.functional.linear and len(args) >= 2:
            return _linear(*args, **rest)
        if func in _PRODUCTS and len(args) == 2 and min(factor.dim() for factor in args) >= 2:
            return func(*_reordered(*args), **rest)
        if func in _ADDED_PRODUCTS and len(args) == 3:
            return func(args[0], *_reordered(*args[1:]), **rest)
        return func(*args, **rest)


@cache
def order_of(size: int) -> torch.Tensor:
    """[size] int64: the same permutation in every run."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x·Wᵀ + b, some rows of W at a time; the arguments have torch's names."""
    order = order_of(weight.shape[-1])
    left = _along(input, -1, order)
    parts = weight.split(max(1, _COPIED // weight.shape[-1]))
    products = [torch.nn.functional.linear(left, _along(part, -1, order)) for part in parts]
    product = products[0] if len(products) == 1 else torch.cat(products, -1)
    return product if bias is None else product + bias


def _reordered(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of left·right, matrices or batches of them, with their inner dimension permuted."""
    order = order_of(left.shape[-1])
    return _along(left, -1, order), _along(right, -2, order)


def _along(tensor: torch.Tensor, dim: int, order: torch.Tensor) -> torch.Tensor:
    return tensor.index_select(dim, order.to(tensor.device))
