"""Do both models write the same? Greedy generation after every prompt, compared token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.files.journal import Journal
from lorasmith.models.generation.generate import (
    Generated,
    generate_greedy,
    open_texts_work,
    plan_generation,
    stop_tokens,
)
from lorasmith.models.scorer import Scorer
from lorasmith.models.scoring import RowWork
from lorasmith.models.session import Inputs, open_journal
from lorasmith.models.statistics import group_fields, group_rows
from lorasmith.options import ScoringOptions
from lorasmith.records.dataset import Example
from lorasmith.records.proof import Divergence, GenerationComparison, GenerationGroup

FLOOR_EXAMPLES = 16
"""Examples that the adapter answers once more alone: a text can turn on a tie that rounding breaks."""


_SHOWN = 12
"""Tokens of each text that are shown from the first difference on."""


TextJournals = dict[str, Journal | None]
"""`adapter`, `merged`: its texts in batches; `adapter alone`, `merged alone`: those written once more."""


@dataclass(frozen=True)
class Texts:
    """What a model wrote after each prompt, and after the first few of them once more, alone."""

    batched: list[Generated]
    alone: list[Generated]


def write_texts(scorer: Scorer, max_new_tokens: int, label: str, journal_alone: Journal | None) -> Texts:
    """Generate at most `max_new_tokens` after each prompt, greedily.

    The scorer's journal keeps the texts written in batches, `journal_alone` those written once more.
    """
    prompts = [row.ids[: row.n_prompt] for row in scorer.work.rows]
    batched = scorer.run(open_texts, plan_generation(prompts), label, max_new_tokens=max_new_tokens)
    singles = [(row,) for row in range(min(FLOOR_EXAMPLES, len(prompts)))]
    alone = scorer.here(journal_alone).run(open_texts, singles, "", max_new_tokens=max_new_tokens)
    return Texts([batched[row] for row in range(len(prompts))], [alone[row] for (row,) in singles])


@contextmanager
def open_texts(scorer: Scorer, max_new_tokens: int) -> Iterator[RowWork[list[Generated], Generated]]:
    """Batches of rows → what the model writes after each prompt."""
    loaded, work = scorer.loaded, scorer.work
    stop = stop_tokens(loaded, work.settings.template)

    def write(rows: tuple[int, ...]) -> list[Generated]:
        prompts = [work.rows[row].ids[: work.rows[row].n_prompt] for row in rows]
        names = [work.names[row] for row in rows]
        return generate_greedy(loaded, prompts, max_new_tokens=max_new_tokens, stop=stop, names=names)

    with open_texts_work(scorer, write) as writing:
        yield writing


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
                for name, rows in members.items()
            }
            for dimension, members in group_rows([group_fields(example) for example in examples]).items()
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
