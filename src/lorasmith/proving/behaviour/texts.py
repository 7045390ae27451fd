"""Do both models write the same? Greedy generation after every prompt, compared token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.executors.base import ChunkLog, Executor, WorkSpec, map_chunks
from lorasmith.files.journal import Journal
from lorasmith.machine.allocator import keep_memory
from lorasmith.models.device import Route, use_route
from lorasmith.models.generation.generate import (
    Generated,
    from_arrays,
    generate_greedy,
    plan_generation,
    stop_tokens,
    to_arrays,
)
from lorasmith.models.hidden_states import Replica
from lorasmith.models.load import LoadedModel
from lorasmith.models.scoring import RowWork
from lorasmith.models.session import Inputs, ScoringOptions, Workload, open_journal
from lorasmith.models.statistics import group_fields, group_rows
from lorasmith.progress import Progress
from lorasmith.records.dataset import Example
from lorasmith.records.proof import Divergence, GenerationComparison, GenerationGroup

FLOOR_EXAMPLES = 16
"""Examples that the adapter answers once more alone: a text can turn on a tie that rounding breaks."""

"""Where a worker finds the function of this name."""

_SHOWN = 12
"""Tokens of each text that are shown from the first difference on."""


TextJournals = dict[str, Journal | None]
"""`adapter`, `merged`: its texts in batches; `adapter alone`, `merged alone`: those written once more."""


@dataclass(frozen=True)
class Texts:
    """What a model wrote after each prompt, and after the first few of them once more, alone."""

    batched: list[Generated]
    alone: list[Generated]


def write_texts(
    work: Workload,
    model: LoadedModel,
    route: Route,
    max_new_tokens: int,
    label: str,
    journals: tuple[Journal | None, Journal | None],
    progress: Progress,
    executor: Executor,
    replica: Replica,
    log: ChunkLog,
) -> Texts:
    """Generate at most `max_new_tokens` after each prompt, greedily.

    One journal keeps the texts written in batches, the other those written alone.
    """
    spec = WorkSpec(open_texts, {"replica": replica, "max_new_tokens": max_new_tokens}, replica.gpu)
    prompts = [row.ids[: row.n_prompt] for row in work.rows]
    found: dict[int, Generated] = {}
    with open_writing(work, model, route, max_new_tokens) as writing:
        with progress(label, total=len(prompts), unit="row") as advance:
            plan = plan_generation(prompts)
            for rows, texts in executor.map_chunks(plan, writing, journals[0], spec, log):
                found.update(zip(rows, texts, strict=True))
                advance(len(rows))
        singles = [(row,) for row in range(min(FLOOR_EXAMPLES, len(prompts)))]
        alone = dict(map_chunks(singles, writing, journals[1]))
    return Texts([found[row] for row in range(len(prompts))], [alone[row][0] for row in singles])


@contextmanager
def open_text_journals(
    output: Path | None, inputs: Inputs, options: ScoringOptions, max_new_tokens: int | None
) -> Iterator[TextJournals]:
    """Journals beside the record `output`; none where there is no record or nothing to write."""
    names = [name + way for name in ("adapter", "merged") for way in ("", " alone")]
    if output is None or max_new_tokens is None:
        yield {}
        return
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                open_journal(
                    output.with_name(f".{output.name}.{name.replace(' ', '-')}.journal"),
                    inputs,
                    options,
                    max_new_tokens=max_new_tokens,
                )
            )
            for name in names
        }


@contextmanager
def open_texts(replica: Replica, max_new_tokens: int) -> Iterator[RowWork[list[Generated]]]:
    """The same work in another process."""
    model, work, route = replica.open()
    with open_writing(work, model, route, max_new_tokens) as writing:
        yield writing


@contextmanager
def open_writing(
    work: Workload, model: LoadedModel, route: Route, max_new_tokens: int
) -> Iterator[RowWork[list[Generated]]]:
    """Batches of rows → what the model writes after each prompt."""
    stop = stop_tokens(model, work.settings.template)

    def write(rows: tuple[int, ...]) -> list[Generated]:
        prompts = [work.rows[row].ids[: work.rows[row].n_prompt] for row in rows]
        names = [work.names[row] for row in rows]
        return generate_greedy(model, prompts, max_new_tokens=max_new_tokens, stop=stop, names=names)

    with keep_memory(), use_route(route):
        yield RowWork(work.rows, model.device, write, to_arrays=to_arrays, from_arrays=from_arrays)


def compare_texts(
    examples: Sequence[Example], a: Texts, b: Texts, tokenizer: Any, max_new_tokens: int
) -> GenerationComparison:
    """The texts of both models token by token, and A's against its own."""
    texts_a, texts_b, again = a.batched, b.batched, a.alone
    agreed = [_agreement(one, two) for one, two in zip(texts_a, texts_b, strict=True)]
    same = [one == two for one, two in zip(texts_a, texts_b, strict=True)]
    return GenerationComparison(
        max_new_tokens=max_new_tokens,
        examples=len(examples),
        same=sum(same),
        same_fraction=sum(same) / len(examples),
        unfinished_a=sum(not text.finished for text in texts_a),
        unfinished_b=sum(not text.finished for text in texts_b),
        tokens_before_divergence=sum(agreed) / len(examples),
        groups={
            dimension: {
                name: GenerationGroup(
                    examples=len(rows),
                    same=sum(same[row] for row in rows),
                    tokens_before_divergence=sum(agreed[row] for row in rows) / len(rows),
                )
                for name, rows in found.items()
            }
            for dimension, found in group_rows([group_fields(example) for example in examples]).items()
        },
        divergences=[
            Divergence(
                id=example.id,
                position=place,
                text_a=tokenizer.decode(one.tokens[place : place + _SHOWN]),
                text_b=tokenizer.decode(two.tokens[place : place + _SHOWN]),
            )
            for example, place, one, two, equal in zip(examples, agreed, texts_a, texts_b, same, strict=True)
            if not equal
        ],
        floor_same=sum(one == two for one, two in zip(texts_a, again, strict=False)),
        floor_examples=len(again),
    )


def _agreement(one: Generated, two: Generated) -> int:
    """How many tokens agree from the start."""
    for place, (a, b) in enumerate(zip(one.tokens, two.tokens, strict=False)):
        if a != b:
            return place
    return min(len(one.tokens), len(two.tokens))
