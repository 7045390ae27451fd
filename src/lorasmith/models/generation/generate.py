"""Greedy generation in batches: padded on the left with positions that do not count the padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorasmith.errors import CheckpointError
from lorasmith.machine.allocator import keep_memory
from lorasmith.models.device import use_route
from lorasmith.models.generation.decoding import last_positions_only, left_padded, positions
from lorasmith.models.load import LoadedModel
from lorasmith.models.scorer import Scorer
from lorasmith.models.scoring import Arrays, Rows, RowWork
from lorasmith.models.text import end_token

GENERATE_ROWS = 16
"""Rows generated together: each step then reads the weights once for all of them."""


@dataclass(frozen=True)
class Generated:
    """What a model wrote after one prompt."""

    tokens: list[int]
    """Without the token that ended it."""
    finished: bool
    """False when the limit cut it off."""


def to_arrays(texts: list[Generated]) -> Arrays:
    """One array a text for the journal: whether it ended, then its tokens."""
    return [np.array([text.finished, *text.tokens], dtype=np.int64) for text in texts]


def from_arrays(rows: Rows, arrays: Arrays) -> list[Generated]:
    """The texts that `to_arrays` was given."""
    return [Generated([int(token) for token in array[1:]], bool(array[0])) for array in arrays]


@contextmanager
def open_texts_work(
    scorer: Scorer, write: Callable[[Rows], list[Generated]]
) -> Iterator[RowWork[list[Generated], Generated]]:
    """Writing as work for `Scorer.run`: in a journal each text is whether it ended, then its tokens."""
    with keep_memory(), use_route(scorer.route):
        yield RowWork(
            scorer.work.rows,
            scorer.loaded.device,
            write,
            to_arrays=to_arrays,
            from_arrays=from_arrays,
            per_row=lambda texts: texts,
        )


def stop_tokens(loaded: LoadedModel, template: str) -> list[int]:
    """What ends an answer: the template's end token and whatever the model folder names as EOS."""
    return ending_tokens(
        loaded.tokenizer, getattr(loaded.model.generation_config, "eos_token_id", None), template
    )


def ending_tokens(tokenizer: Any, named: int | list[int] | None, template: str) -> list[int]:
    """What ends an answer, where no model is loaded; `named` is what its generation config calls EOS."""
    tokens: set[int] = set()
    for value in (tokenizer.eos_token_id, named):
        tokens.update(value if isinstance(value, list) else [] if value is None else [value])
    if tokens or template == "chat":
        tokens.add(end_token(tokenizer, template))
    return sorted(tokens)


def plan_generation(prompts: Sequence[Sequence[int]], rows: int = GENERATE_ROWS) -> list[tuple[int, ...]]:
    """Which prompts go together: of like length, longest first, at most `rows` of them."""
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    return [tuple(order[start : start + rows]) for start in range(0, len(order), rows)]


def generate_greedy(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[int],
    stop_texts: Sequence[str] = (),
    names: Sequence[str] = (),
) -> list[Generated]:
    """The likeliest token at every step, until a stop token, one of `stop_texts`, or the limit.

    A loop of its own: `generate` of transformers mixes in what the model's folder says of sampling and
    penalties, and two models can only be compared by what they find likeliest. The tokens of a stop text are
    kept; the caller cuts the text. Raises `CheckpointError` for logits that are not finite, with the row of
    `names`.
    """
    ids, mask = left_padded(prompts, loaded.device)
    rows: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    cache: Any = None
    with last_positions_only(loaded.model):
        for _ in range(max_new_tokens):
            output = loaded.model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **positions(loaded.model, mask, ids.shape[1]),
            )
            cache = output.past_key_values
            most, ids = (largest.to(mask.device) for largest in output.logits[:, -1:].max(-1))
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            sound = most[:, 0].isfinite().tolist()  # a maximum takes up what is not a number
            for place, token in enumerate(ids[:, 0].tolist()):
                if finished[place]:
                    continue
                if not sound[place]:
                    raise CheckpointError(
                        f"the model's logits are not finite after {len(rows[place])} tokens that it wrote",
                        where=f"example {names[place]!r}" if names else None,
                        expected="finite numbers",
                        remedy="check the model's weights, or compute in float32",
                    )
                finished[place] = token in stop
                if not finished[place]:
                    rows[place].append(token)
                    finished[place] = bool(stop_texts) and _ends(loaded.tokenizer, rows[place], stop_texts)
            if all(finished):
                break
    return [Generated(row, done) for row, done in zip(rows, finished, strict=True)]


def _ends(tokenizer: Any, row: list[int], stop_texts: Sequence[str]) -> bool:
    text = tokenizer.decode(row)
    return any(end in text for end in stop_texts)
