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
from lorasmith.executors.base import ChunkLog, Executor, WorkSpec
from lorasmith.files.journal import Journal
from lorasmith.machine.allocator import keep_memory
from lorasmith.models.device import Route, use_route
from lorasmith.models.generation.generate import (
    GENERATE_ROWS,
    Generated,
    from_arrays,
    generate_greedy,
    plan_generation,
    stop_tokens,
    to_arrays,
)
from lorasmith.models.hidden_states import Replica
from lorasmith.models.layout import lay_out
from lorasmith.models.load import LoadedModel
from lorasmith.models.scoring import RowWork, open_forward, raise_non_finite
from lorasmith.models.session import Workload
from lorasmith.models.text import Encoded, frame, response_tokens
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
    executor: Executor,
    replica: Replica,
    log: ChunkLog,
) -> dict[int, list[float]]:
    """Per row, the log-probability (nats) of each letter as the beginning of the answer."""
    if not rows:
        return {}
    spec = WorkSpec(open_choices, {"replica": replica, "rows": list(rows)}, replica.gpu)
    found: dict[int, list[float]] = {}
    with (
        open_weighing(loaded, work, rows, route) as weighing,
        progress("Weigh choices", total=len(rows), unit="row") as advance,
    ):
        plan = work.plan([weighing.encoded[row] for row in rows])
        batches = [tuple(rows[place] for place in batch) for batch in plan]
        for batch, values in executor.map_chunks(batches, weighing, journal, spec, log):
            found.update(zip(batch, values.tolist(), strict=True))
            advance(len(batch))
    return found


@contextmanager
def open_choices(replica: Replica, rows: list[int]) -> Iterator[RowWork[npt.NDArray[np.float32]]]:
    """The same work in another process."""
    loaded, work, route = replica.open()
    with open_weighing(loaded, work, rows, route) as weighing:
        yield weighing


@contextmanager
def open_weighing(
    loaded: LoadedModel, work: Workload, rows: Sequence[int], route: Route
) -> Iterator[RowWork[npt.NDArray[np.float32]]]:
    """Batches of `rows` → `[rows, letters]` log-probabilities."""
    around = frame(loaded.tokenizer, work.settings.template, end_of_turn=False)
    space = " " if work.settings.template == "plain" else ""  # after "Answer:" a text goes on with a space
    answers = [response_tokens(loaded.tokenizer, space + letter, around) for letter in LETTERS]
    # A tokenizer may spell the space on its own: what all four begin with goes to the prompt.
    together = zip(*answers, strict=False)
    shared = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, together)]
    letters = [answer[len(shared)] for answer in answers]
    asked = [_asking([*row.ids[: row.n_prompt], *shared], letters[0]) for row in work.rows]
    columns = torch.tensor(letters, device=loaded.device)
    with open_forward(loaded, [asked[row] for row in rows], route) as forward:

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
        )


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
    executor: Executor,
    replica: Replica,
    log: ChunkLog,
) -> dict[int, Generated]:
    """Per row, what the model writes greedily after the prompt, benchmark by benchmark."""
    batches = []
    for source in RULES:
        own = [row for row in rows if work.examples[row].metadata.source == source]
        together = min(GENERATE_ROWS, work.settings.batch_size or GENERATE_ROWS)
        planned = plan_generation([work.rows[row].ids[: work.rows[row].n_prompt] for row in own], together)
        batches += [tuple(own[place] for place in batch) for batch in planned]
    spec = WorkSpec(open_answers, {"replica": replica}, replica.gpu)
    found: dict[int, Generated] = {}
    with (
        open_writing(loaded, work, route) as writing,
        progress("Write answers", total=len(rows), unit="row") as advance,
    ):
        for batch, texts in executor.map_chunks(batches, writing, journal, spec, log):
            found.update(zip(batch, texts, strict=True))
            advance(len(batch))
    return found


@contextmanager
def open_answers(replica: Replica) -> Iterator[RowWork[list[Generated]]]:
    """The same work in another process."""
    loaded, work, route = replica.open()
    with open_writing(loaded, work, route) as writing:
        yield writing


@contextmanager
def open_writing(loaded: LoadedModel, work: Workload, route: Route) -> Iterator[RowWork[list[Generated]]]:
    """Batches of rows of one benchmark → what the model writes after each prompt."""
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

    with keep_memory(), use_route(route):
        yield RowWork(work.rows, loaded.device, write, to_arrays=to_arrays, from_arrays=from_arrays)


def room_for(prompt: Sequence[int], context: int | None, new_tokens: int) -> list[int]:
    """The prompt, cut at its beginning where the answer would not fit into the context behind it."""
    if context is None or len(prompt) + new_tokens <= context:
        return list(prompt)
    return list(prompt)[-max(1, context - new_tokens) :]


def cut(text: str, stop_texts: Sequence[str]) -> str:
    """The text up to the first of `stop_texts`."""
    ends = [place for place in (text.find(stop) for stop in stop_texts) if place >= 0]
    return text[: min(ends)] if ends else text
