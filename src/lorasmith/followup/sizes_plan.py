"""Is a wanted size possible? The sizes of all methods for one model, before an hour is spent on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lorasmith.checkpoint.model import open_checkpoint
from lorasmith.errors import UsageError
from lorasmith.files.machine import human_bytes
from lorasmith.files.paths import StrPath
from lorasmith.followup.sizes import (
    GGUF_TYPES,
    SIZE_ONLY,
    Shape,
    block_type,
    choose_group,
    gguf_bytes,
    integer_bytes,
    plain_bytes,
    shapes_of,
)
from lorasmith.records.compression import PlannedSize, SizePlan

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}

COMMON_SIZES = (0.1e9, 0.135e9, 0.36e9, 0.5e9, 1e9, 1.5e9, 3e9, 7e9, 8e9, 14e9, 32e9, 70e9)
"""Parameters of models that can be had: a size that fits is named among them."""

_INTEGERS = ((8, 128), (4, 128), (3, 128), (2, 64))
"""Bits and preferred group of the integer methods."""

_WRITTEN = {8: "compressed-tensors --bits 8", 4: "compressed-tensors"}
"""Those that are written, and what asks for them."""


def parse_size(text: str) -> int:
    """Bytes of `540MB`, `1.5 GiB` or a plain number; raises `UsageError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(found.group(2).upper()) if found else None
    if found is None or factor is None or float(found.group(1)) * factor < 1:
        raise UsageError(
            f"{text!r} is not a size", expected="a number above 0 with a unit, such as 540MB, 4GB or 3.5GiB"
        )
    return int(float(found.group(1)) * factor)


def plan_compression(model: StrPath, *, target_size: str | None = None) -> SizePlan:
    """The sizes of all methods for the model in a folder, from its headers alone; no tensor is read.

    Raises `CheckpointError` for a folder that is no 16- or 32-bit model, `UsageError` for a target that is no
    size.
    """
    target = None if target_size is None else parse_size(target_size)
    checkpoint = open_checkpoint(Path(model))
    return plan_sizes(
        shapes_of(checkpoint), tied=checkpoint.tied, architecture=checkpoint.architecture, target=target
    )


def plan_sizes(
    shapes: Sequence[Shape], *, tied: bool, architecture: str = "unknown", target: int | None = None
) -> SizePlan:
    """The plan for a list of tensors: pure arithmetic. `target` is in bytes."""
    parameters = sum(shape.elements for shape in shapes)
    methods = [
        PlannedSize(
            method=method,
            format=form,
            embeddings=embeddings,
            bytes=size,
            bits_per_weight=8 * size / parameters,
            fits=None if target is None else size <= target,
            fitting_parameters=None if target is None else int(target * parameters / size),
        )
        for method, form, embeddings, size in _methods(shapes, tied)
    ]
    methods.sort(key=lambda planned: (-planned.bytes, planned.method))
    plan = SizePlan(
        architecture=architecture,
        parameters=parameters,
        embedding_parameters=sum(s.elements for s in shapes if s.kind in ("embedding", "head")),
        tied=tied,
        bytes=sum(plain_bytes(shape) for shape in shapes),
        target_bytes=target,
        target_bits_per_weight=None if target is None else 8 * target / parameters,
        reachable=None if target is None else any(planned.fits for planned in methods),
        methods=methods,
        smallest=methods[-1].method,
    )
    return plan.model_copy(update={"advice": _advice(plan)})


def written_bytes(shapes: Sequence[Shape], tied: bool, form: str, bits: int, group: int) -> int:
    """What the plan gives for one format that `compress` writes."""
    if form == "compressed-tensors":
        return integer_bytes(shapes, bits, group)
    return gguf_bytes(shapes, GGUF_TYPES[form.removeprefix("gguf:")](shapes, tied))


def _methods(shapes: Sequence[Shape], tied: bool) -> list[tuple[str, str | None, str, int]]:
    """Method, the format that writes it, what becomes of the embeddings, bytes."""
    found: list[tuple[str, str | None, str, int]] = []
    for bits, wanted in _INTEGERS:
        # A group that does not divide the width is not an option: the next smaller one that does is.
        group = choose_group(shapes, wanted) or choose_group(shapes)
        if group is None:
            continue
        name = f"int{bits} g{group}"
        found.append((name, _WRITTEN.get(bits), "16 bits", integer_bytes(shapes, bits, group)))
        everything = integer_bytes(shapes, bits, group, embeddings=True)
        found.append((f"{name}, embeddings too", None, f"int{bits}", everything))
    for name, rule in GGUF_TYPES.items():
        kinds = rule(shapes, tied)
        embedding = next((block_type(s, kinds(s)) for s in shapes if s.kind == "embedding"), None)
        found.append((f"gguf {name}", f"gguf:{name}", embedding or "16 bits", gguf_bytes(shapes, kinds)))
    for name, rule in SIZE_ONLY.items():
        kinds = rule(shapes, tied)
        embedding = next((block_type(s, kinds(s)) for s in shapes if s.kind == "embedding"), None)
        found.append((f"gguf {name}, at least", None, embedding or "16 bits", gguf_bytes(shapes, kinds)))
    return found


def _advice(plan: SizePlan) -> list[str]:
    """What the figures mean for the target, in sentences."""
    if plan.target_bytes is None or plan.target_bits_per_weight is None:
        return []
    target = human_bytes(plan.target_bytes)
    needed = plan.target_bits_per_weight
    need = f"{target} for {_count(plan.parameters)} parameters is {needed:.2f} bit per weight."
    least = plan.methods[-1]
    written = [planned for planned in plan.methods if planned.format]
    smallest_written = min(written, key=lambda planned: planned.bytes)
    fitting = [planned for planned in written if planned.fits]
    if fitting:
        best = fitting[0]
        return [need, f"It fits: the largest format that does is {best.format}, {human_bytes(best.bytes)}."]
    words = [need]
    if plan.reachable:
        words.append(
            f"No format that is written here reaches it (the smallest is {smallest_written.format}, "
            f"{human_bytes(smallest_written.bytes)}); {least.method} would, {human_bytes(least.bytes)}."
        )
    else:
        words.append(
            f"No method reaches it: the smallest of all, {least.method}, is {human_bytes(least.bytes)} "
            f"({least.bits_per_weight:.2f} bit per weight); the smallest that is written here, "
            f"{smallest_written.format}, is {human_bytes(smallest_written.bytes)}."
        )
    room = smallest_written.fitting_parameters or 0
    known = [size for size in COMMON_SIZES if size <= room]
    words.append(
        f"At {smallest_written.bits_per_weight:.2f} bit per weight {target} hold {_count(room)} parameters"
        + (f": a model of {_count(known[-1])} parameters fits, this one does not." if known else ".")
    )
    return words


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"
