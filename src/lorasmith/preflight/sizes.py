"""How large a run is: the model by its headers, the test set in tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.checkpoint.adapter import Adapter
from lorasmith.checkpoint.model import HEAD_NAMES, Checkpoint, text_config
from lorasmith.data.rows import read_examples
from lorasmith.merging.plan import Plan
from lorasmith.records.dataset import Example

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_CHARACTERS_PER_TOKEN = 3.5
"""Where there is no tokenizer.json to count with: English text and code lie between 3 and 4.5."""
_TEMPLATE_TOKENS = 20
"""What a chat template adds to a row: role markers and a short system message (SmolLM2: 22, Qwen2.5: 24)."""

_FLOOR_ROWS = 16
"""So many rows does the adapter run again: for the noise floor, and in the serving type."""


@dataclass(frozen=True)
class ModelSize:
    """What the time and the memory of a forward depend on."""

    parameters: int
    """Number of parameters as they are stored: a tied head counts once."""
    active: int
    """Number of the layers' parameters that one token meets: of experts only those it is sent to."""
    hidden: int
    layers: int
    vocabulary: int
    context: int | None
    base_bytes: int
    merged_bytes: int
    adapter_parameters: int


@dataclass(frozen=True)
class WorkSize:
    """What there is to score."""

    rows: int
    tokens: int
    """Prompts, templates and responses."""
    scored: int
    longest: int
    squares: int
    """Σ length², which attention grows with."""
    floor_tokens: int
    """Tokens of the rows that the adapter runs again: for the noise floor, and in the serving type."""
    counted: bool
    """False where the tokens are guessed from the characters."""


def model_size(base: Checkpoint, adapter: Adapter | None, merged_bytes: int) -> ModelSize:
    """From headers and config alone."""
    config = text_config(base.config)
    counts = {name: info.elements for name, info in base.tensors.items()}
    outer = sum(count for name, count in counts.items() if name.endswith(EMBEDDINGS) or name in HEAD_NAMES)
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    body = sum(counts.values()) - outer
    return ModelSize(
        parameters=sum(counts.values()),
        active=int(body - experts * (1 - _routed(config))),
        hidden=_whole(config, "hidden_size", "n_embd", "d_model") or 0,
        layers=_whole(config, "num_hidden_layers", "n_layer") or 0,
        vocabulary=_whole(config, "vocab_size") or 0,
        context=_whole(config, "max_position_embeddings", "n_positions"),
        base_bytes=plain_bytes(base),
        merged_bytes=merged_bytes,
        adapter_parameters=sum(info.elements for info in adapter.tensors.values()) if adapter else 0,
    )


def plain_bytes(base: Checkpoint) -> int:
    """Bytes of the tensors, those of quantized weights in the type that the model has them in."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2}
    return sum(
        info.elements * sizes[base.decoded[name].dtype] if name in base.decoded else info.nbytes
        for name, info in base.tensors.items()
    )


def _routed(config: Mapping[str, Any]) -> float:
    """The fraction of the experts that a token is sent to."""
    there = _whole(config, "num_local_experts", "num_experts", "n_routed_experts")
    used = _whole(config, "num_experts_per_tok", "num_experts_per_token")
    return min(1.0, used / there) if there and used else 1.0


def _whole(config: Mapping[str, Any], *names: str) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def work_size(examples: list[Example], base: Path) -> WorkSize:
    """Counted with the base's tokenizer where it has a tokenizer.json, else guessed from the characters."""
    pairs, counted = row_lengths(examples, base)
    totals = sorted(prompt + response for prompt, response in pairs)
    step = max(1, len(totals) // _FLOOR_ROWS)
    return WorkSize(
        rows=len(totals),
        tokens=sum(totals),
        scored=sum(response + 1 for _, response in pairs),
        longest=totals[-1] if totals else 0,
        squares=sum(length * length for length in totals),
        floor_tokens=sum(totals[::step][:_FLOOR_ROWS]),
        counted=counted,
    )


def row_lengths(examples: list[Example], base: Path) -> tuple[list[tuple[int, int]], bool]:
    """Tokens of each prompt, with its template, and of each response; False where they are guessed."""
    lengths = _lengths(examples, base / "tokenizer.json")
    pairs = lengths or [
        (int(len(row.prompt) / _CHARACTERS_PER_TOKEN), int(len(row.response) / _CHARACTERS_PER_TOKEN) + 1)
        for row in examples
    ]
    return [(prompt + _TEMPLATE_TOKENS, response) for prompt, response in pairs], lengths is not None


def _lengths(examples: list[Example], file: Path) -> list[tuple[int, int]] | None:
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises bare Exception; scoring says what is wrong with the file
        return None
    prompts = tokenizer.encode_batch([row.prompt for row in examples], add_special_tokens=False)
    responses = tokenizer.encode_batch([row.response for row in examples], add_special_tokens=False)
    return [(len(prompt.ids), len(one.ids)) for prompt, one in zip(prompts, responses, strict=True)]


# What answering the benchmarks' own questions would take (`--tasks`).


@dataclass(frozen=True)
class AnswerSize:
    """The questions of a test set, and how long their answers may get."""

    rows: int
    tokens: int
    """Number of tokens in all questions, templates included."""
    written: int
    """Tokens of all written answers, each as long as its limit: nobody knows where a model stops."""
    together: int
    """Rows that are written at a time: each step reads the weights once for all of them."""


def answer_size(examples: Sequence[Example], base: Path, task_module: Path | None = None) -> AnswerSize:
    """The size of the rows that `--tasks` can put to a model; no rows where there are none."""
    from lorasmith.models.generation.generate import GENERATE_ROWS
    from lorasmith.scoring.own_metric import OwnMetric, judge_of

    own = None if task_module is None else OwnMetric(task_module)
    judged = [(row, judge) for row in examples if (judge := judge_of(row, own)) is not None]
    known = [row for row, _ in judged]
    limits = [judge.max_new_tokens for _, judge in judged if judge.answered_by == "text"]
    pairs, _ = row_lengths(known, base)
    return AnswerSize(
        rows=len(known),
        tokens=sum(prompt for prompt, _ in pairs),
        written=sum(limits),
        together=max(1, min(GENERATE_ROWS, len(limits))),
    )


# What a calibrated merge would take: its rows in tokens, and the arithmetic of its layers.


_ROWS = 400
"""Training rows whose tokens are counted; the others are taken to be as long."""
_LONGEST = 2_048
"""merging/calibrated/rows.py cuts longer rows."""


@dataclass(frozen=True)
class CalibrationSize:
    """The work of rounding that is fitted to rows; operations over all layers."""

    tokens: int
    squares: int
    """Σ length² over the rows."""
    moments: float
    """Float32 operations of Σ x·xᵀ."""
    factors: float
    """Float64 operations of inverting the second moments."""
    feedback: float
    """Float32 operations of going over the columns."""
    elements: int
    """Weights that are rounded so."""


def calibration_size(plan: Plan, train: Sequence[Path], base: Path, budget: int) -> CalibrationSize:
    """From the shapes of the merge and the lengths of the training rows.

    An input is shared by the layers beside each other that have its width, such as query, key and value.
    Raises `DataError` for training rows that cannot be read.
    """
    tokens, squares = _rows(train, base, budget)
    shapes = _linear(plan)
    inputs = {(_place(name), width) for name, (_, width) in shapes.items()}
    return CalibrationSize(
        tokens=tokens,
        squares=squares,
        moments=sum(2.0 * tokens * width**2 for _, width in inputs),
        # Cholesky's factor (I³/3) and the inverse of a triangle (I³).
        factors=sum(4 / 3 * width**3 for _, width in inputs),
        # The pass (O·I²), what the update does to the outputs (2·O·I²), and twice the refinement (2·O·I² for
        # the gradient, O·I² for keeping it).
        feedback=sum(9.0 * rows * width**2 for rows, width in shapes.values()),
        elements=sum(rows * width for rows, width in shapes.values()),
    )


def _rows(train: Iterable[Path], base: Path, budget: int) -> tuple[int, int]:
    """Tokens, and the sum of squared lengths, of as many rows as the budget holds."""
    examples = [example for file in train for example in read_examples(file)]
    if not examples:
        return 0, 0
    step = max(1, len(examples) // _ROWS)
    pairs, _ = row_lengths(examples[::step][:_ROWS], base)
    lengths = [min(sum(pair), _LONGEST) for pair in pairs]
    mean = sum(lengths) / len(lengths)
    tokens = min(budget, int(mean * len(examples)))
    return tokens, int(tokens * sum(length**2 for length in lengths) / sum(lengths))


def _linear(plan: Plan) -> dict[str, tuple[int, int]]:
    """Changed matrices but embedding and head: name → rows (outputs) and columns (inputs)."""
    shapes = {}
    for output in plan.outputs:
        outer = output.name.endswith(EMBEDDINGS) or output.name in HEAD_NAMES
        if output.change is not None and len(output.shape) == 2 and not outer:
            shapes[output.name] = (output.shape[0], output.shape[1])
    return shapes


def _place(name: str) -> str:
    """The module that a linear layer lies in: `….layers.3.mlp.up_proj.weight` → `….layers.3.mlp`."""
    return name.rsplit(".", 2)[0]
