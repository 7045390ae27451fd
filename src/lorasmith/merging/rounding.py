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

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Target:
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

    @property
    def smallest_normal(self) -> float:
        """Below it numbers are subnormal."""
        return 2.0**self.emin

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0**self.emax


TARGETS: dict[str, Target] = {
    "F32": Target("F32", torch.float32, torch.int32, 24, -126, 127),
    "BF16": Target("BF16", torch.bfloat16, torch.int16, 8, -126, 127),
    "F16": Target("F16", torch.float16, torch.int16, 11, -14, 15),
}


def error_factor(rank: int) -> float:
    """g of the proof: |x̂ − x| ≤ g·(|x̂| + 2M) for `rank` products in all."""
    if rank >= 1 << 20:
        raise ValueError(f"the proof of the error bound holds for ranks below 2**20, not {rank}")
    return (rank + 6) * 2.0**-53


def round_reals(values: Array, target: Target) -> Array:
    """RN of float64 numbers onto the target's grid, as float64; infinite where the target overflows.

    One rounding, straight to the grid: going through float32 would round twice.
    """
    _, exponent = np.frexp(values)
    quantum = np.maximum(exponent - 1, target.emin) - (target.precision - 1)
    with np.errstate(over="ignore"):
        rounded = np.ldexp(np.rint(np.ldexp(values, -quantum)), quantum)
    return np.where(np.abs(rounded) > target.largest, np.copysign(np.inf, values), rounded)


def round_expansion(high: Array, low: Array, target: Target) -> tuple[Array, npt.NDArray[np.bool_]]:
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


def to_stored(values: Array, target: Target) -> torch.Tensor:
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


def round_certain(
    candidate: torch.Tensor, relative: float, absolute: torch.Tensor, target: Target
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round float64 candidates; and the flat indices of those that the error bound leaves open.

    The bound is ρ|x̂| + a with `relative` ρ and `absolute` a (broadcast to the candidates; infinite where
    nothing is known). What is returned for an open element is of no use.
    """
    if target.dtype == "F32":
        return _round_to_float32(candidate, relative, absolute)
    if relative > 2.0**-27:
        return candidate.to(target.native), torch.arange(candidate.numel())
    single = candidate.to(torch.float32)
    bits = single.view(torch.int32)
    tail_bits = 24 - target.precision
    tail = torch.bitwise_and(bits, (1 << tail_bits) - 1)
    near = tail.sub_(1 << (tail_bits - 1)).abs_().le_(1)
    size = single.abs()
    smallest = (absolute * 2.0**26).clamp_(min=target.smallest_normal).to(torch.float32)
    # Not "too small or too large", but "not in between": a NaN is neither and must be flagged too.
    inside = (size >= smallest * (1 + 2.0**-20)).logical_and_(size < target.largest)
    open_ = near.to(torch.bool).logical_or_(inside.logical_not_())
    return single.to(target.native), open_.view(-1).nonzero().view(-1)


def _round_to_float32(
    candidate: torch.Tensor, relative: float, absolute: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    target = TARGETS["F32"]
    reach = relative * 2.0**53 + 2**16 + 1
    if reach >= 1 << 27:
        return candidate.to(torch.float32), torch.arange(candidate.numel())
    tail = torch.bitwise_and(candidate.view(torch.int64), (1 << 29) - 1)
    near = tail.sub_(1 << 28).abs_() <= int(reach)
    size = candidate.abs()
    smallest = (absolute * (2.0**37 * (1 + 2.0**-20))).clamp_(min=target.smallest_normal)
    inside = (size >= smallest).logical_and_(size < target.largest)
    open_ = near.logical_or_(inside.logical_not_())
    return candidate.to(torch.float32), open_.view(-1).nonzero().view(-1)


def settle(candidate: Array, bound: Array, target: Target) -> tuple[Array, npt.NDArray[np.bool_]]:
    """RN of single elements with |x̂ − x| ≤ `bound`, and which of them are certain."""
    below = round_reals(np.nextafter(candidate - bound, -np.inf), target)
    above = round_reals(np.nextafter(candidate + bound, np.inf), target)
    # Zeros of both signs compare equal, but then the sign of x is not known.
    certain = (below == above) & (np.signbit(below) == np.signbit(above)) & np.isfinite(below)
    zero = (candidate == 0) & (bound == 0)
    return np.where(zero, 0.0, below), certain | zero


def cast(values: torch.Tensor, target: Target) -> torch.Tensor:
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
    bits = single.view(torch.int32)
    odd = torch.bitwise_and(torch.bitwise_right_shift(bits, 16), 1)
    rounded = torch.bitwise_right_shift(bits + odd + 0x7FFF, 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(single.isnan(), single.to(torch.bfloat16), rounded)
