"""Do both models write the same? Greedy generation after every prompt, compared token by token."""

from __future__ import annotations

from lorasmith.errors import UsageError
from lorasmith.executors.local import work_through
from lorasmith.models.arithmetic import Route, use_route
from lorasmith.models.generate import (
    Generated,
    from_arrays,
    generate_greedy,
    plan_generation,
    stop_tokens,
    to_arrays,
)
from lorasmith.models.load import LoadedModel
from lorasmith.models.session import Workload
from lorasmith.models.work import RowWork
from lorasmith.progress import Progress
from lorasmith.records.proof import Divergence, GenerationComparison

FLOOR_EXAMPLES = 16
"""Examples that the adapter answers once more alone: a text can turn on a tie that rounding breaks."""

_SHOWN = 12
"""Tokens of each text that are shown from the first difference on."""


def compare_generation(
    work: Workload, a: LoadedModel, b: LoadedModel, route: Route, max_new_tokens: int, progress: Progress
) -> GenerationComparison:
    """Generate at most `max_new_tokens` after each prompt with both models and compare.

    Raises `UsageError` for a limit below 1.
    """
    if max_new_tokens < 1:
        raise UsageError(f"{max_new_tokens} tokens leave nothing to compare", expected="1 or more")
    prompts = [row.ids[: row.n_prompt] for row in work.rows]
    stop = stop_tokens(a, work.settings.template)
    with use_route(route):
        texts_a = _generate(work, a, prompts, stop, max_new_tokens, "Generate (adapter)", progress)
        texts_b = _generate(work, b, prompts, stop, max_new_tokens, "Generate (merged)", progress)
        again = [
            generate_greedy(a, [prompt], max_new_tokens=max_new_tokens, stop=stop)[0]
            for prompt in prompts[:FLOOR_EXAMPLES]
        ]
    agreed = [_agreement(one, two) for one, two in zip(texts_a, texts_b, strict=True)]
    same = [one == two for one, two in zip(texts_a, texts_b, strict=True)]
    return GenerationComparison(
        max_new_tokens=max_new_tokens,
        examples=len(prompts),
        same=sum(same),
        same_fraction=sum(same) / len(prompts),
        unfinished_a=sum(not text.finished for text in texts_a),
        unfinished_b=sum(not text.finished for text in texts_b),
        tokens_before_divergence=sum(agreed) / len(prompts),
        divergences=[
            Divergence(
                id=name,
                position=place,
                text_a=a.tokenizer.decode(one.tokens[place : place + _SHOWN]),
                text_b=a.tokenizer.decode(two.tokens[place : place + _SHOWN]),
            )
            for name, place, one, two, equal in zip(work.names, agreed, texts_a, texts_b, same, strict=True)
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


def _generate(
    work: Workload,
    model: LoadedModel,
    prompts: list[list[int]],
    stop: list[int],
    max_new_tokens: int,
    label: str,
    progress: Progress,
) -> list[Generated]:
    found: dict[int, Generated] = {}
    generating: RowWork[list[Generated]] = RowWork(
        work.rows,
        action=lambda rows: generate_greedy(
            model, [prompts[row] for row in rows], max_new_tokens=max_new_tokens, stop=stop
        ),
        to_arrays=to_arrays,
        from_arrays=from_arrays,
    )
    with progress(label, total=len(prompts), unit="row") as advance:
        for rows, texts in work_through(plan_generation(prompts), generating):
            found.update(zip(rows, texts, strict=True))
            advance(len(rows))
    return [found[row] for row in range(len(prompts))]
