"""How many bytes each way to quantize makes of a model: arithmetic on the shapes of its tensors alone.

Block sizes are those of the GGUF format (llama.cpp's ggml-common.h; the `gguf` package has the same table).
Which tensor of a mixed type gets more bits follows llama.cpp's `llama_tensor_get_type`. The packed layout is
that of compressed-tensors: integers in 32-bit words, a 16-bit scale for each group, and the shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.checkpoint.header import ITEM_BITS
from lorasmith.checkpoint.model import HEAD_NAMES, Checkpoint, open_checkpoint
from lorasmith.errors import UsageError
from lorasmith.files.atomic import StrPath
from lorasmith.machine.resources import human_bytes
from lorasmith.records.compression import PlannedSize, SizePlan

BLOCKS: dict[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q5_0": (32, 22),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ1_S": (256, 50),
}
"""GGUF type → weights of a block, bytes of a block."""

_NARROW = {"Q2_K": "Q5_0", "Q4_K": "Q5_0", "Q5_K": "Q5_0", "Q6_K": "Q8_0", "IQ1_S": "Q5_0"}
"""What stands in for a type whose block does not divide the width of a tensor."""

_ALIGNMENT = 32
"""GGUF begins every tensor at a multiple of so many bytes."""

GROUPS = (128, 64, 32)
"""Group sizes that are tried, largest first: fewer scales to store, but the group has to divide the width."""

_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|wpe|embed_in|word_embeddings)\.weight$")
_OTHER_MODALITY = re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector)\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_VALUES = re.compile(r"(v_proj|c_attn|query_key_value|qkv_proj)\.weight$")
_DOWN = re.compile(r"(down_proj|fc2|dense_4h_to_h|w2|mlp\.c_proj)(\.weight)?$")


@dataclass(frozen=True)
class Shape:
    """One tensor of a model, as far as sizes go."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"
    """A name of `ITEM_BITS`."""
    kind: str = "kept"
    """`embedding`, `head`, `matrix` or `kept` (norms, biases, other modalities: never quantized)."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Length of the rows along which weights are grouped."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """How many such rows there are."""
        return self.elements // self.width if self.width else 0

    @property
    def layer(self) -> int | None:
        """Number of the block that it belongs to."""
        match = _LAYER.search(self.name)
        return int(match.group(1)) if match else None


def shapes_of(checkpoint: Checkpoint) -> list[Shape]:
    """The tensors of a model folder, read off its headers; a head tied to the embedding is left out."""
    return classify(
        ((name, info.shape, info.dtype) for name, info in checkpoint.tensors.items()), checkpoint.tied
    )


def classify(tensors: Iterable[tuple[str, tuple[int, ...], str]], tied: bool) -> list[Shape]:
    """Say of each (name, shape, dtype) what it is."""
    shapes = []
    for name, shape, dtype in tensors:
        if name in HEAD_NAMES:
            if not tied:
                shapes.append(Shape(name, shape, dtype, "head"))
        elif len(shape) < 2 or _OTHER_MODALITY.search(name) or _LAYER.search(name) is None:
            embeds = len(shape) == 2 and _EMBEDDINGS.search(name)
            shapes.append(Shape(name, shape, dtype, "embedding" if embeds else "kept"))
        else:
            shapes.append(Shape(name, shape, dtype, "matrix"))
    return shapes


def choose_group(shapes: Sequence[Shape], wanted: int | None = None) -> int | None:
    """The largest of `GROUPS` (or `wanted`) that divides the width of every matrix; None when none does."""
    widths = {shape.width for shape in shapes if shape.kind == "matrix"}
    for group in (wanted,) if wanted else GROUPS:
        if all(width % group == 0 for width in widths):
            return group
    return None


def plain_bytes(shape: Shape) -> int:
    """Unquantized: 16 bits a number, however the source stores its floats; other types as they are."""
    bits = 16 if shape.dtype.startswith(("F", "BF")) else ITEM_BITS[shape.dtype]
    return (shape.elements * bits + 7) // 8


def packed_bytes(shape: Shape, bits: int, group: int) -> int:
    """Bytes in compressed-tensors' packed layout: 32-bit words, 16-bit scales, the shape as two int64."""
    words = shape.rows * math.ceil(shape.width * bits / 32)
    scales = shape.rows * math.ceil(shape.width / group)
    return 4 * words + 2 * scales + 16


def integer_bytes(shapes: Sequence[Shape], bits: int, group: int, *, embeddings: bool = False) -> int:
    """A whole model with its matrices in `bits`; with `embeddings` those and the head as well."""
    quantized = ("matrix", "embedding", "head") if embeddings else ("matrix",)
    return sum(
        packed_bytes(shape, bits, group) if shape.kind in quantized else plain_bytes(shape)
        for shape in shapes
    )


def block_type(shape: Shape, kind: str) -> str | None:
    """The GGUF type that a tensor really gets: `kind`, what stands in for it, or None for 16 bits."""
    for name in (kind, _NARROW.get(kind, "")):
        if name in BLOCKS and shape.width % BLOCKS[name][0] == 0:
            return name
    return None


def block_bytes(shape: Shape, kind: str) -> int:
    """Bytes in GGUF's blocks of the type that it really gets."""
    name = block_type(shape, kind)
    if name is None:
        return 2 * shape.elements
    weights, size = BLOCKS[name]
    return shape.elements // weights * size


def gguf_bytes(shapes: Sequence[Shape], kind_of: Callable[[Shape], str]) -> int:
    """All tensors of a GGUF file, each padded to the alignment; what is one-dimensional takes 32 bits."""
    total = 0
    for shape in shapes:
        quantized = shape.kind != "kept" and len(shape.shape) > 1
        size = block_bytes(shape, kind_of(shape)) if quantized else 4 * shape.elements
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return total


def _uniform(kind: str) -> Callable[[Sequence[Shape], bool], Callable[[Shape], str]]:
    """Every matrix and embedding in one type: what no file of that type can be smaller than."""
    return lambda shapes, tied: lambda shape: kind


def _simple(kind: str) -> Callable[[Sequence[Shape], bool], Callable[[Shape], str]]:
    """One type throughout but for the output, which gets at least six bits."""

    def choose(shapes: Sequence[Shape], tied: bool) -> Callable[[Shape], str]:
        return lambda shape: "Q6_K" if _is_output(shape, tied) and kind != "Q8_0" else kind

    return choose


def _medium(kind: str) -> Callable[[Sequence[Shape], bool], Callable[[Shape], str]]:
    """`…_K_M`: about half of the values' and down projections, and the output, in six bits."""

    def choose(shapes: Sequence[Shape], tied: bool) -> Callable[[Shape], str]:
        layers = 1 + max((shape.layer or 0 for shape in shapes), default=0)

        def kind_of(shape: Shape) -> str:
            favoured = _VALUES.search(shape.name) or _DOWN.search(shape.name)
            more = favoured and shape.layer is not None and _use_more_bits(shape.layer, layers)
            return "Q6_K" if more or _is_output(shape, tied) else kind

        return kind_of

    return choose


def _is_output(shape: Shape, tied: bool) -> bool:
    return shape.kind == "head" or (tied and shape.kind == "embedding")


def _use_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between them (llama.cpp's rule)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


GGUF_TYPES: dict[str, Callable[[Sequence[Shape], bool], Callable[[Shape], str]]] = {
    "q8_0": _simple("Q8_0"),
    "q6_k": _simple("Q6_K"),
    "q5_k_m": _medium("Q5_K"),
    "q4_k_m": _medium("Q4_K"),
    "q4_0": _simple("Q4_0"),
}
"""The GGUF types that are written, with their rule for each tensor."""

SIZE_ONLY: dict[str, Callable[[Sequence[Shape], bool], Callable[[Shape], str]]] = {
    "q2_k": _uniform("Q2_K"),
    "iq1_s": _uniform("IQ1_S"),
}
"""Types that llama.cpp writes, listed so that the plan knows how small a model gets at all: a lower bound."""


# Is a wanted size possible? The sizes of all methods for one model, before an hour is spent on it.


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
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or factor is None or float(match.group(1)) * factor < 1:
        raise UsageError(
            f"{text!r} is not a size", expected="a number above 0 with a unit, such as 540MB, 4GB or 3.5GiB"
        )
    return int(float(match.group(1)) * factor)


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
    methods: list[tuple[str, str | None, str, int]] = []
    for bits, wanted in _INTEGERS:
        # A group that does not divide the width is not an option: the next smaller one that does is.
        group = choose_group(shapes, wanted) or choose_group(shapes)
        if group is None:
            continue
        name = f"int{bits} g{group}"
        methods.append((name, _WRITTEN.get(bits), "16 bits", integer_bytes(shapes, bits, group)))
        everything = integer_bytes(shapes, bits, group, embeddings=True)
        methods.append((f"{name}, embeddings too", None, f"int{bits}", everything))
    for name, rule in GGUF_TYPES.items():
        kinds = rule(shapes, tied)
        embedding = next((block_type(s, kinds(s)) for s in shapes if s.kind == "embedding"), None)
        methods.append((f"gguf {name}", f"gguf:{name}", embedding or "16 bits", gguf_bytes(shapes, kinds)))
    for name, rule in SIZE_ONLY.items():
        kinds = rule(shapes, tied)
        embedding = next((block_type(s, kinds(s)) for s in shapes if s.kind == "embedding"), None)
        methods.append((f"gguf {name}, at least", None, embedding or "16 bits", gguf_bytes(shapes, kinds)))
    return methods


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
