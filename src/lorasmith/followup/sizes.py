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

from lorasmith.checkpoint.header import ITEM_BITS
from lorasmith.checkpoint.model import HEAD_NAMES, Checkpoint

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
        found = _LAYER.search(self.name)
        return int(found.group(1)) if found else None


def shapes_of(checkpoint: Checkpoint) -> list[Shape]:
    """The tensors of a model folder, read off its headers; a head tied to the embedding is left out."""
    return classify(
        ((name, info.shape, info.dtype) for name, info in checkpoint.tensors.items()), checkpoint.tied
    )


def classify(tensors: Iterable[tuple[str, tuple[int, ...], str]], tied: bool) -> list[Shape]:
    """Say of each (name, shape, dtype) what it is."""
    found = []
    for name, shape, dtype in tensors:
        if name in HEAD_NAMES:
            if not tied:
                found.append(Shape(name, shape, dtype, "head"))
        elif len(shape) < 2 or _OTHER_MODALITY.search(name) or _LAYER.search(name) is None:
            embeds = len(shape) == 2 and _EMBEDDINGS.search(name)
            found.append(Shape(name, shape, dtype, "embedding" if embeds else "kept"))
        else:
            found.append(Shape(name, shape, dtype, "matrix"))
    return found


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
    """In compressed-tensors' packed layout: 32-bit words, a 16-bit scale a group, the shape as two int64."""
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
    """In GGUF's blocks of the type that it really gets."""
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
