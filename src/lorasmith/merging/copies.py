"""Is this the base that the adapter was trained on? An adapter that keeps a copy of a weight can tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorasmith.adapters.base import Copy
from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.errors import AdapterError
from lorasmith.merging.rounding import TARGETS, cast
from lorasmith.merging.tensors import Stored

_STEP = 1 << 22


def check_copies(copies: Sequence[Copy], base: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Raise `AdapterError` unless every copy that an adapter keeps equals the base's tensor.

    A copy of a lower precision must be the base's values rounded to it, and the other way round.
    """
    for copy in copies:
        adapter = adapters[copy.adapter]
        kept = Stored(adapter.file.path, adapter.file.tensors[copy.tensor])
        if copy.base is not None:
            other = Stored(base.shard_of(copy.base).path, base.tensors[copy.base])
        else:
            other = Stored(adapter.file.path, adapter.file.tensors[str(copy.twin)])
        common = min(kept.info.elements, other.info.elements)
        for first in range(0, common, _STEP):
            count = min(_STEP, common - first)
            if not _agree(
                kept.read(first, count), kept.info.dtype, other.read(first, count), other.info.dtype
            ):
                raise _differs(copy, adapter)


def _differs(copy: Copy, adapter: Adapter) -> AdapterError:
    if copy.base is None:
        return AdapterError(
            f"the adapter stores {copy.twin} twice, with different values",
            where=adapter.file.path,
            expected=f"{copy.tensor} equal to it",
            remedy="save the adapter again",
        )
    return AdapterError(
        f"the adapter's copy of {copy.base} differs from this base's",
        where=adapter.file.path,
        expected="the base that the adapter was trained on",
        remedy="give the model that adapter_config.json names as its base",
    )


def _agree(kept: torch.Tensor, kept_type: str, given: torch.Tensor, given_type: str) -> bool:
    if torch.equal(kept.to(torch.float64), given.to(torch.float64)):
        return True
    down = kept_type in TARGETS and torch.equal(cast(given, TARGETS[kept_type]), kept)
    up = given_type in TARGETS and torch.equal(cast(kept, TARGETS[given_type]), given)
    return down or up
