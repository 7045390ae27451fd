"""What a model answers to the examples of a benchmark: the likeliest choice, or a generated text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt
import torch

from lorasmith.benchmarks.base import Judge
from lorasmith.benchmarks.choices import LETTERS
from lorasmith.models.generation.generate import (
    GENERATE_ROWS,
    Generated,
    generate_greedy,
    open_texts_work,
    plan_generation,
    stop_tokens,
)
from lorasmith.models.layout import lay_out, plan_rows
from lorasmith.models.scorer import Scorer
from lorasmith.models.scoring import Arrays, RowWork, open_forward, raise_non_finite, score_states
from lorasmith.models.text import Encoded, frame, prompt_tokens, response_tokens


@dataclass(frozen=True)
class Rules:
    """How long an answer may be, and which text ends it where no chat template does."""

    max_new_tokens: int
    stop_texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, judge: Judge, max_new_tokens: int | None = None) -> Rules:
        """Those of who asks, with another limit where one is given."""
        return cls(max_new_tokens or judge.max_new_tokens, judge.stop_texts)


def letter_likelihoods(scorer: Scorer, rows: Sequence[int]) -> dict[int, list[float]]:
    """Per row, the log-probability (nats) of the letter of each choice as the beginning of the answer."""
    if not rows:
        return {}
    asked, _ = _questions(scorer, rows)
    plan = scorer.work.plan([asked[row] for row in rows])
    batches = [tuple(rows[place] for place in batch) for batch in plan]
    weighed = scorer.run(open_choices, batches, "Weigh choices", asked_rows=list(rows))
    return {row: values[: len(choices_of(scorer, row))] for row, values in weighed.items()}


def choices_of(scorer: Scorer, row: int) -> list[str]:
    """The choices of a row that has some."""
    choices: list[str] = scorer.work.examples[row].metadata.extra()["choices"]
    return choices


@contextmanager
def open_choices(
    scorer: Scorer, asked_rows: list[int]
) -> Iterator[RowWork[npt.NDArray[np.float32], list[float]]]:
    """Batches of `asked_rows` → `[rows, letters]` log-probabilities."""
    loaded, work = scorer.loaded, scorer.work
    asked, letters = _questions(scorer, asked_rows)
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


def _questions(scorer: Scorer, asked_rows: Sequence[int]) -> tuple[list[Encoded], list[int]]:
    """Every row with one scored token behind its prompt, and the token of each letter that is needed."""
    letters_needed = LETTERS[: max(len(choices_of(scorer, row)) for row in asked_rows)]
    tokenizer, template = scorer.loaded.tokenizer, scorer.work.settings.template
    around = frame(tokenizer, template, end_of_turn=False)
    space = " " if template == "plain" else ""  # after "Answer:" a text goes on with a space
    answers = [response_tokens(tokenizer, space + letter, around) for letter in letters_needed]
    # A tokenizer may spell the space on its own: what all of them begin with goes to the prompt.
    together = zip(*answers, strict=False)
    shared = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, together)]
    letters = [answer[len(shared)] for answer in answers]
    prompts = [[*row.ids[: row.n_prompt], *shared] for row in scorer.work.rows]
    return [Encoded.behind([*ids, letters[0]], len(ids)) for ids in prompts], letters


def ending_likelihoods(scorer: Scorer, rows: Sequence[int]) -> dict[int, list[float]]:
    """Per row, the log-probability (nats) of each choice as the end of the prompt, over all its tokens."""
    if not rows:
        return {}
    endings = _endings(scorer, rows)
    settings, most = scorer.work.settings, max(map(len, endings.values()))
    # A batch holds every choice of its rows: so many fewer rows fit into it.
    plan = plan_rows(
        [max(endings[row], key=lambda encoded: len(encoded.ids)) for row in rows],
        settings.layout,
        max(1, settings.batch_tokens // most),
        None if settings.batch_size is None else max(1, settings.batch_size // most),
    )
    batches = [tuple(rows[place] for place in batch) for batch in plan]
    return scorer.run(open_endings, batches, "Weigh endings", asked_rows=list(rows))


@contextmanager
def open_endings(scorer: Scorer, asked_rows: list[int]) -> Iterator[RowWork[Arrays, list[float]]]:
    """Batches of `asked_rows` → per row the log-probability of each of its endings."""
    loaded, work = scorer.loaded, scorer.work
    endings = _endings(scorer, asked_rows)
    longest = {row: max(own, key=lambda encoded: len(encoded.ids)) for row, own in endings.items()}
    with open_forward(loaded, list(longest.values()), scorer.route) as forward:

        def weigh(batch: tuple[int, ...]) -> Arrays:
            owners = [row for row in batch for _ in endings[row]]
            flat = [encoded for row in batch for encoded in endings[row]]
            laid_out = lay_out(range(len(flat)), flat, work.settings.layout)
            scored, _ = score_states(forward, laid_out, [work.names[row] for row in owners])
            by_place = dict(zip(laid_out.rows, scored, strict=True))
            sums = [np.sum(by_place[place], dtype=np.float64) for place in range(len(flat))]
            return [
                np.array([one for one, owner in zip(sums, owners, strict=True) if owner == row])
                for row in batch
            ]

        yield RowWork(
            [longest.get(row, encoded) for row, encoded in enumerate(work.rows)],
            loaded.device,
            weigh,
            to_arrays=lambda values: values,
            from_arrays=lambda batch, arrays: arrays,
            per_row=lambda values: [own.tolist() for own in values],
        )


def _endings(scorer: Scorer, rows: Sequence[int]) -> dict[int, list[Encoded]]:
    """Per row its prompt with each choice behind it, whose tokens are scored."""
    tokenizer, template, work = scorer.loaded.tokenizer, scorer.work.settings.template, scorer.work
    around = frame(tokenizer, template, end_of_turn=False)
    space = " " if template == "plain" else ""
    endings: dict[int, list[Encoded]] = {}
    for row in rows:
        prompt = work.rows[row].ids[: work.rows[row].n_prompt]
        own = [response_tokens(tokenizer, space + choice, around) for choice in choices_of(scorer, row)]
        begun = room_for(prompt, scorer.loaded.context, max(map(len, own)))
        endings[row] = [Encoded.behind([*begun, *tokens], len(begun)) for tokens in own]
    return endings


def generated_answers(
    scorer: Scorer,
    rows: Sequence[int],
    rules: Mapping[str, Rules],
    prompts: Mapping[int, str] | None = None,
) -> dict[int, Generated]:
    """Per row, what the model writes greedily after its prompt, or the one given, by its source's rules."""
    around = frame(scorer.loaded.tokenizer, scorer.work.settings.template, end_of_turn=False)
    given = {
        row: prompt_tokens(scorer.loaded.tokenizer, prompt, around) for row, prompt in (prompts or {}).items()
    }
    batches = []
    for source in rules:
        own = [row for row in rows if scorer.work.examples[row].metadata.source == source]
        together = min(GENERATE_ROWS, scorer.work.settings.batch_size or GENERATE_ROWS)
        planned = plan_generation([_asked(scorer, row, given) for row in own], together)
        batches += [tuple(own[place] for place in batch) for batch in planned]
    return scorer.run(open_answers, batches, "Write answers", rules=dict(rules), given=given)


def _asked(scorer: Scorer, row: int, given: Mapping[int, list[int]]) -> list[int]:
    own = scorer.work.rows[row]
    return given[row] if row in given else own.ids[: own.n_prompt]


@contextmanager
def open_answers(
    scorer: Scorer, rules: dict[str, Rules], given: dict[int, list[int]]
) -> Iterator[RowWork[list[Generated], Generated]]:
    """Batches of rows of one source → what the model writes after each prompt."""
    loaded, work = scorer.loaded, scorer.work
    template = work.settings.template
    stop = stop_tokens(loaded, template)

    def write(batch: tuple[int, ...]) -> list[Generated]:
        own = rules[work.examples[batch[0]].metadata.source]
        prompts = [_asked(scorer, row, given) for row in batch]
        return generate_greedy(
            loaded,
            [room_for(prompt, loaded.context, own.max_new_tokens) for prompt in prompts],
            max_new_tokens=own.max_new_tokens,
            stop=stop,
            stop_texts=own.stop_texts if template == "plain" else (),
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
