"""What a model answers to the examples of a benchmark: the likeliest choice, or a generated text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.benchmarks.choices import LETTERS
from lorasmith.models.generation.generate import (
    GENERATE_ROWS,
    Generated,
    generate_greedy,
    open_texts_work,
    plan_generation,
    stop_tokens,
)
from lorasmith.models.layout import lay_out
from lorasmith.models.scorer import Scorer
from lorasmith.models.scoring import RowWork, open_forward, raise_non_finite
from lorasmith.models.text import Encoded, frame, response_tokens


@dataclass(frozen=True)
class Rules:
    """How long an answer may be, and which text ends it where no chat template does."""

    max_new_tokens: int
    stop_texts: tuple[str, ...] = ()


RULES: dict[str, Rules] = {
    "DROP": Rules(64, ("\n",)),
    "MATH": Rules(512, ("\nProblem:",)),
    # The stops of the HumanEval paper (arXiv:2107.03374, section 3.2).
    "HumanEval": Rules(384, ("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
}
"""Benchmarks answered by generation; those with choices are answered by likelihood."""


def choice_likelihoods(scorer: Scorer, rows: Sequence[int]) -> dict[int, list[float]]:
    """Per row, the log-probability (nats) of each letter as the beginning of the answer."""
    if not rows:
        return {}
    asked, _ = _questions(scorer)
    plan = scorer.work.plan([asked[row] for row in rows])
    batches = [tuple(rows[place] for place in batch) for batch in plan]
    return scorer.run(open_choices, batches, "Weigh choices", asked_rows=list(rows))


@contextmanager
def open_choices(
    scorer: Scorer, asked_rows: list[int]
) -> Iterator[RowWork[npt.NDArray[np.float32], list[float]]]:
    """Batches of `asked_rows` → `[rows, letters]` log-probabilities."""
    loaded, work = scorer.loaded, scorer.work
    asked, letters = _questions(scorer)
    columns = torch.tensor(letters, device=loaded.device)
    with open_forward(loaded, [asked[row] for row in asked_rows], scorer.route) as forward:

        def weigh(batch: tuple[int, ...]) -> npt.NDArray[np.float32]:
            laid_out = lay_out(batch, asked, work.settings.layout).to(loaded.device)
            logits = torch.cat(list(forward.logits(laid_out)))
            values = logits[:, columns.to(logits.device)] - logits.logsumexp(-1, keepdim=True)
            sound = values.isfinite().all(-1).tolist()
            if not all(sound):
                raise_non_finite(forward, laid_out, work.names[batch[sound.index(False)]])
            return np.asarray(values.cpu())

        yield RowWork(
            asked,
            loaded.device,
            weigh,
            to_arrays=lambda values: [values],
            from_arrays=lambda batch, arrays: arrays[0],
            per_row=lambda values: values.tolist(),
        )


def _questions(scorer: Scorer) -> tuple[list[Encoded], list[int]]:
    """Every row with one scored token behind its prompt, and the token of each letter."""
    tokenizer, template = scorer.loaded.tokenizer, scorer.work.settings.template
    around = frame(tokenizer, template, end_of_turn=False)
    space = " " if template == "plain" else ""  # after "Answer:" a text goes on with a space
    answers = [response_tokens(tokenizer, space + letter, around) for letter in LETTERS]
    # A tokenizer may spell the space on its own: what all four begin with goes to the prompt.
    together = zip(*answers, strict=False)
    shared = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, together)]
    letters = [answer[len(shared)] for answer in answers]
    prompts = [[*row.ids[: row.n_prompt], *shared] for row in scorer.work.rows]
    return [Encoded([*ids, letters[0]], len(ids), scored_from=len(ids)) for ids in prompts], letters


def generated_answers(scorer: Scorer, rows: Sequence[int]) -> dict[int, Generated]:
    """Per row, what the model writes greedily after the prompt, benchmark by benchmark."""
    work, batches = scorer.work, []
    for source in RULES:
        own = [row for row in rows if work.examples[row].metadata.source == source]
        together = min(GENERATE_ROWS, work.settings.batch_size or GENERATE_ROWS)
        planned = plan_generation([work.rows[row].ids[: work.rows[row].n_prompt] for row in own], together)
        batches += [tuple(own[place] for place in batch) for batch in planned]
    return scorer.run(open_answers, batches, "Write answers")


@contextmanager
def open_answers(scorer: Scorer) -> Iterator[RowWork[list[Generated], Generated]]:
    """Batches of rows of one benchmark → what the model writes after each prompt."""
    loaded, work = scorer.loaded, scorer.work
    template = work.settings.template
    stop = stop_tokens(loaded, template)

    def write(batch: tuple[int, ...]) -> list[Generated]:
        rules = RULES[work.examples[batch[0]].metadata.source]
        prompts = [work.rows[row].ids[: work.rows[row].n_prompt] for row in batch]
        return generate_greedy(
            loaded,
            [room_for(prompt, loaded.context, rules.max_new_tokens) for prompt in prompts],
            max_new_tokens=rules.max_new_tokens,
            stop=stop,
            stop_texts=rules.stop_texts if template == "plain" else (),
            names=[work.names[row] for row in batch],
        )

    with open_texts_work(scorer, write) as writing:
        yield writing


def room_for(prompt: Sequence[int], context: int | None, new_tokens: int) -> list[int]:
    """The prompt, cut at its beginning where the answer would not fit into the context behind it."""
    if context is None or len(prompt) + new_tokens <= context:
        return list(prompt)
    return list(prompt)[-max(1, context - new_tokens) :]


def cut(text: str, stop_texts: Sequence[str]) -> str:
    """The text up to the first of `stop_texts`."""
    ends = [place for place in (text.find(stop) for stop in stop_texts) if place >= 0]
    return text[: min(ends)] if ends else text
