"""Correct rounding to float32, bfloat16 and float16: certain where float64 suffices, flagged where not.

The merged element is RN(x): the real number x = W + Σₜ wₜ·sₜ·Σₖ Lₜ[o,k]·Rₜ[k,i] rounded to nearest, ties to
even. float64 gives a candidate x̂ with |x̂ − x| ≤ E, and E is proved, not estimated:

*Error of the candidate.* Let u = 2⁻⁵³ and γₙ = n·u/(1 − n·u). All stored numbers are float64 numbers without
error. L is scaled first, L̂ = fl(fl(w·s)·L): at most two roundings. x̂ is a sum of n = K + 1 terms, W and the
K products L̂·R, in whatever order a matrix product adds them, each product rounded or fused into its
addition. A term meets at most n roundings there (one of its product, n − 1 of additions), so with the two of
its scaling every term is multiplied by some 1 + θ with |θ| ≤ γₙ₊₂ (Higham, Accuracy and Stability of
Numerical Algorithms, §3.1), and |x̂ − x| ≤ γₖ₊₃·(|W| + M) with M = Σ|w·s·L·R|. As |W| ≤ |x| + M and
|x| ≤ |x̂| + |x̂ − x|, this gives |x̂ − x| ≤ g·(|x̂| + 2M) with g = γₖ₊₃/(1 − γₖ₊₃) ≤ (K + 6)·u for K < 2²⁰.
M is not summed up: by Cauchy and Schwarz M ≤ ‖w·s·L[o,:]‖·‖R[:,i]‖, taken at the row's norm and the largest
column's, and enlarged by 2⁻²⁰ for its own rounding. Products neither under- nor overflow, because factors
outside float32's range are refused. A product of the Strassen kind would break the first step; BLAS has none.

*Which elements are certain.* Let |x̂ − x| ≤ ρ|x̂| + a; above ρ = g and a = 2gM. For 16-bit targets, let
f = RN₃₂(x̂). Midpoints between two target numbers are float32 numbers, and none lies next to a power of two.
If ρ ≤ 2⁻²⁷ and |f| ≥ 2²⁶·a, then |x̂ − x| ≤ (2⁻²⁷ + 2⁻²⁶)(1 + 2⁻²⁴)|f| < 2⁻²⁵|f| ≤ ½ ulp₃₂(f), and
|f − x| < ulp₃₂(f). So no midpoint lies between x and f but perhaps f itself: unless f is a midpoint (its
neighbours are set aside as well), x rounds as f does. For float32 the same is said of the 29 bits that
float64 has beyond float32: if |x̂| ≥ 2³⁷·a, the error is at most 2⁵³·ρ + 2¹⁶ ulps of float64, as one of these
is at least 2⁻⁵³|x̂|. Elements that are too small (also all below the target's smallest normal number), too
large, not numbers, or near a midpoint go on to `settle`, which compares RN(x̂ − E) with RN(x̂ + E): equal
means certain, as rounding is monotone. What is left is decided exactly (exact.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.errors import AdapterError, CheckpointError, InputError
from lorasmith.merging.numbers.threads import Arrays

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format."""

    dtype: str
    native: torch.dtype
    bits: torch.dtype
    """An integer type of the same width."""
    precision: int
    """Significant bits with the leading one."""
    emin: int
    """Exponent of the smallest normal number."""
    emax: int
    """Exponent of the largest number."""

    @cached_property
    def smallest_normal(self) -> float:
        """Below it numbers are subnormal."""
        return 2.0**self.emin

    @cached_property
    def largest(self) -> float:
        """The largest finite number."""
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0**self.emax


TARGETS: dict[str, FloatFormat] = {
    "F32": FloatFormat("F32", torch.float32, torch.int32, 24, -126, 127),
    "BF16": FloatFormat("BF16", torch.bfloat16, torch.int16, 8, -126, 127),
    "F16": FloatFormat("F16", torch.float16, torch.int16, 11, -14, 15),
}


def error_factor(rank: int) -> float:
    """g of the proof: |x̂ − x| ≤ g·(|x̂| + 2M) for `rank` products in all."""
    if rank >= 1 << 20:
        raise ValueError(f"the proof of the error bound holds for ranks below 2**20, not {rank}")
    return (rank + 6) * 2.0**-53


def round_reals(values: Array, target: FloatFormat) -> Array:
    """RN of float64 numbers onto the target's grid, as float64; infinite where the target overflows.

    One rounding, straight to the grid: going through float32 would round twice.
    """
    _, exponent = np.frexp(values)
    quantum = np.maximum(exponent - 1, target.emin) - (target.precision - 1)
    with np.errstate(over="ignore"):
        rounded = np.ldexp(np.rint(np.ldexp(values, -quantum)), quantum)
    return np.where(np.abs(rounded) > target.largest, np.copysign(np.inf, values), rounded)


def round_expansion(high: Array, low: Array, target: FloatFormat) -> tuple[Array, npt.NDArray[np.bool_]]:
    """RN of the exact sums high + low, where |low| ≤ ½ ulp(high); and which of them are ties."""
    _, exponent = np.frexp(high)
    quantum = np.maximum(exponent - 1, target.emin) - (target.precision - 1)
    scaled = np.ldexp(high, -quantum)
    nearest = np.rint(scaled)
    halfway = np.abs(scaled - nearest) == 0.5
    directed = np.where(low > 0, np.floor(scaled) + 1, np.floor(scaled))
    with np.errstate(over="ignore"):
        rounded = np.ldexp(np.where(halfway & (low != 0), directed, nearest), quantum)
    overflow = np.abs(rounded) > target.largest
    return np.where(overflow, np.copysign(np.inf, high), rounded), halfway & (low == 0)


def to_stored(values: Array, target: FloatFormat) -> torch.Tensor:
    """Numbers that lie on the target's grid, as the target's type; no rounding happens here.

    The bits are put together by hand for bfloat16, as a processor's own conversion may flush subnormals.
    """
    single = values.astype(np.float32)
    if target.dtype == "F32":
        return torch.from_numpy(single)
    if target.dtype == "F16":
        return torch.from_numpy(values.astype(np.float16))
    halves = (single.view(np.uint32) >> 16).astype(np.uint16)
    return torch.from_numpy(halves.view(np.int16)).view(torch.bfloat16)


@dataclass(frozen=True)
class Bound:
    """What is known of the candidates of a tensor: |x̂ − x| ≤ ρ|x̂| + a."""

    relative: float
    """ρ."""
    absolute: Array
    """a [m, 1], [1, n] or [m, n], for the block in hand; infinite where nothing is known."""
    largest: float
    """No smaller than any a of the tensor: what most blocks are tested with, as it costs nothing."""


def open_elements(
    candidate: torch.Tensor, bound: Bound, target: FloatFormat, own: Arrays, out: torch.Tensor
) -> Indices:
    """Round float64 candidates [m, n] into `out`; the flat positions that the error bound leaves open.

    What stands in `out` at an open position is of no use.
    """
    if bound.relative > 2.0**-27:
        out.copy_(candidate)
        return np.arange(candidate.numel())
    if target.dtype == "F32":
        return _open_singles(candidate, bound, own, out)
    out.copy_(own.single.copy_(candidate))
    shift, unit, last = _tail_test(target)
    torch.add(shift, own.single_bits, alpha=unit, out=own.ints)
    np.less_equal(own.int_array, last, out=own.flags)
    if not _all_between(out, bound, target, own):
        limit = np.maximum(bound.absolute * (2.0**26 * (1 + 2.0**-20)), target.smallest_normal)
        size = np.abs(own.single.numpy())
        # NaN is neither between nor outside: it must count as outside.
        inside = (size >= limit) & (size < target.largest)
        np.logical_or(own.flags, ~inside, out=own.flags)
    return np.flatnonzero(own.flags)


@cache
def _tail_test(target: FloatFormat) -> tuple[torch.Tensor, int, int]:
    """A number to add, a factor, and the last of the results that are set aside.

    The factor moves the bits beyond the target's to the top of an integer, the sum turns them so that a
    midpoint and its two neighbours become the three smallest integers.
    """
    tail_bits = 24 - target.precision
    unit = 1 << (32 - tail_bits)
    below = ((1 << (tail_bits - 1)) - 1) * unit
    shift = -(1 << 31) - below
    wrapped = (shift + (1 << 31)) % (1 << 32) - (1 << 31)
    return torch.tensor(wrapped, dtype=torch.int32), unit, -(1 << 31) + 2 * unit


@lru_cache(maxsize=64)
def _bits_of(number: float, target: FloatFormat) -> int:
    return int(torch.tensor(number, dtype=torch.float64).to(target.native).view(torch.int16).item())


def _all_between(out: torch.Tensor, bound: Bound, target: FloatFormat, own: Arrays) -> bool:
    """Whether every size is certainly above the limit and below the largest number, from the rounded bits."""
    limit = max(bound.largest * (2.0**26 * (1 + 2.0**-20)), target.smallest_normal)
    if not limit < target.largest:
        return False
    size = np.bitwise_and(out.view(torch.int16).numpy(), 0x7FFF, out=own.shorts)
    # Rounding keeps the order: a number up to the limit has at most its bits, a NaN has more than any.
    return bool(size.min() > _bits_of(limit, target) and size.max() < _bits_of(target.largest, target))


def _open_singles(candidate: torch.Tensor, bound: Bound, own: Arrays, out: torch.Tensor) -> Indices:
    target = TARGETS["F32"]
    out.copy_(candidate)
    # How far the 29 bits beyond float32 lie from a midpoint, against the error in units of the last place.
    reach = int(bound.relative * 2.0**53) + 2**16 + 1
    tail, flags = own.longs, own.flags
    np.bitwise_and(candidate.numpy().view(np.int64), (1 << 29) - 1, out=tail)
    np.subtract(tail, 1 << 28, out=tail)
    np.abs(tail, out=tail)
    np.less_equal(tail, reach, out=flags)
    size = np.abs(candidate.numpy())
    limit = np.maximum(bound.absolute * (2.0**37 * (1 + 2.0**-20)), target.smallest_normal)
    inside = (size >= limit) & (size < target.largest)
    np.logical_or(flags, ~inside, out=flags)
    return np.flatnonzero(flags)


def settle(candidate: Array, bound: Array, target: FloatFormat) -> tuple[Array, npt.NDArray[np.bool_]]:
    """RN of single elements with |x̂ − x| ≤ `bound`, and which of them are certain."""
    below = round_reals(np.nextafter(candidate - bound, -np.inf), target)
    above = round_reals(np.nextafter(candidate + bound, np.inf), target)
    # Zeros of both signs compare equal, but then the sign of x is not known.
    certain = (below == above) & (np.signbit(below) == np.signbit(above)) & np.isfinite(below)
    zero = (candidate == 0) & (bound == 0)
    return np.where(zero, 0.0, below), certain | zero


def cast(values: torch.Tensor, target: FloatFormat) -> torch.Tensor:
    """Correctly rounded conversion of stored floats to the target; infinite where it overflows."""
    if values.dtype == torch.float64:
        return to_stored(round_reals(values.numpy(), target), target)
    if values.dtype == target.native:
        return values
    single = values.to(torch.float32)  # exact: the source has at most 32 bits
    if target.dtype == "F32":
        return single
    if target.dtype == "F16":
        return single.to(torch.float16)
    # Half a step and the last kept bit are added, so that ties go to even; a NaN must not carry over.
    bits = single.view(torch.int32)
    odd = torch.bitwise_and(torch.bitwise_right_shift(bits, 16), 1)
    rounded = torch.bitwise_right_shift(bits + odd + 0x7FFF, 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(single.isnan(), single.to(torch.bfloat16), rounded)


# Numbers that no merge can be made of.


def not_finite(name: str) -> CheckpointError:
    """NaN or infinities in a tensor that an adapter changes."""
    return CheckpointError(
        f"the base's tensor {name} holds NaN or infinite values",
        expected="finite weights",
        remedy="the base is damaged: fetch it again",
    )


def overflow(name: str, target: FloatFormat) -> InputError:
    """A merged value beyond the largest number of the target's type."""
    if target.dtype == "F16":
        return CheckpointError(
            f"a value of {name} is beyond float16's largest number, {target.largest:.0f}",
            expected="values that float16 can hold",
            remedy="give --precision bfloat16 or float32",
        )
    return AdapterError(
        f"a merged value of {name} is beyond the range of its type",
        expected="an update of a sensible size",
        remedy="the adapter's factors or its scale are far too large",
    )
