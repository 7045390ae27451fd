"""What a model answers to the examples of a benchmark: the likeliest choice, or a generated text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.benchmarks.choices import LETTERS
from lorasmith.executors.local import work_through
from lorasmith.files.journal import Journal
from lorasmith.models.arithmetic import Route, use_route
from lorasmith.models.batches import make_batch, plan_batches
from lorasmith.models.encode import Encoded
from lorasmith.models.generate import (
    GENERATE_ROWS,
    Generated,
    from_arrays,
    generate_greedy,
    plan_generation,
    stop_tokens,
    to_arrays,
)
from lorasmith.models.load import LoadedModel
from lorasmith.models.loglik import open_forward
from lorasmith.models.memory import keep_memory
from lorasmith.models.session import Workload
from lorasmith.models.template import frame, response_tokens
from lorasmith.models.work import RowWork
from lorasmith.progress import Progress


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


def choice_likelihoods(
    loaded: LoadedModel,
    work: Workload,
    rows: Sequence[int],
    route: Route,
    journal: Journal | None,
    progress: Progress,
) -> dict[int, list[float]]:
    """Per row, the log-probability (nats) of each letter as the beginning of the answer."""
    if not rows:
        return {}
    around = frame(loaded.tokenizer, work.settings.template, end_of_turn=False)
    space = " " if work.settings.template == "plain" else ""  # after "Answer:" a text goes on with a space
    answers = [response_tokens(loaded.tokenizer, space + letter, around) for letter in LETTERS]
    # A tokenizer may spell the space on its own: what all four begin with goes to the prompt.
    together = zip(*answers, strict=False)
    shared = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, together)]
    letters = [answer[len(shared)] for answer in answers]
    asked = [_asking([*row.ids[: row.n_prompt], *shared], letters[0]) for row in work.rows]
    columns = torch.tensor(letters, device=loaded.device)
    found: dict[int, list[float]] = {}
    chosen = [asked[row] for row in rows]
    with (
        open_forward(loaded, chosen, route) as forward,
        progress("Weigh choices", total=len(rows), unit="row") as advance,
    ):

        def weigh(batch: tuple[int, ...]) -> npt.NDArray[np.float32]:
            logits = torch.cat(list(forward.logits(make_batch(batch, asked).to(loaded.device))))
            return np.asarray(
                (logits[:, columns.to(logits.device)] - logits.logsumexp(-1, keepdim=True)).cpu()
            )

        weighing: RowWork[npt.NDArray[np.float32]] = RowWork(
            asked, weigh, to_arrays=lambda values: [values], from_arrays=lambda batch, arrays: arrays[0]
        )
        settings = work.settings
        plan = plan_batches([len(row.ids) for row in chosen], settings.batch_tokens, settings.batch_size)
        batches = [tuple(rows[place] for place in batch) for batch in plan]
        for batch, values in work_through(batches, weighing, journal):
            found.update(zip(batch, values.tolist(), strict=True))
            advance(len(batch))
    return found


def _asking(prompt: list[int], letter: int) -> Encoded:
    """A row whose only scored token stands behind the prompt."""
    return Encoded([*prompt, letter], len(prompt), scored_from=len(prompt))


def generated_answers(
    loaded: LoadedModel,
    work: Workload,
    rows: Sequence[int],
    route: Route,
    journal: Journal | None,
    progress: Progress,
) -> dict[int, Generated]:
    """Per row, what the model writes greedily after the prompt, benchmark by benchmark."""
    template = work.settings.template
    stop = stop_tokens(loaded, template)
    prompts = [row.ids[: row.n_prompt] for row in work.rows]
    sources = [example.metadata.source for example in work.examples]

    def write(batch: tuple[int, ...]) -> list[Generated]:
        rules = RULES[sources[batch[0]]]
        return generate_greedy(
            loaded,
            [room_for(prompts[row], loaded.context, rules.max_new_tokens) for row in batch],
            max_new_tokens=rules.max_new_tokens,
            stop=stop,
            stop_texts=rules.stop_texts if template == "plain" else (),
        )

    batches = []
    for source in RULES:
        own = [row for row in rows if sources[row] == source]
        together = min(GENERATE_ROWS, work.settings.batch_size or GENERATE_ROWS)
        planned = plan_generation([prompts[row] for row in own], together)
        batches += [tuple(own[place] for place in batch) for batch in planned]
    found: dict[int, Generated] = {}
    writing: RowWork[list[Generated]] = RowWork(
        work.rows, write, to_arrays=to_arrays, from_arrays=from_arrays
    )
    with (
        keep_memory(),
        use_route(route),
        progress("Write answers", total=len(rows), unit="row") as advance,
    ):
        for batch, texts in work_through(batches, writing, journal):
            found.update(zip(batch, texts, strict=True))
            advance(len(batch))
    return found


def room_for(prompt: Sequence[int], context: int | None, new_tokens: int) -> list[int]:
    """The prompt, cut at its beginning where the answer would not fit into the context behind it."""
    if context is None or len(prompt) + new_tokens <= context:
        return list(prompt)
    return list(prompt)[-max(1, context - new_tokens) :]


def cut(text: str, stop_texts: Sequence[str]) -> str:
    """The text up to the first of `stop_texts`."""
    ends = [place for place in (text.find(stop) for stop in stop_texts) if place >= 0]
    return text[: min(ends)] if ends else text
