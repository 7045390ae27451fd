"""Numbers that no merge can be made of."""

from __future__ import annotations

from lorasmith.errors import AdapterError, CheckpointError, InputError
from lorasmith.merging.rounding import Target


def not_finite(name: str) -> CheckpointError:
    """NaN or infinities in a tensor that an adapter changes."""
    return CheckpointError(
        f"the base's tensor {name} holds NaN or infinite values",
        expected="finite weights",
        remedy="the base is damaged: fetch it again",
    )


def overflow(name: str, target: Target) -> InputError:
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
