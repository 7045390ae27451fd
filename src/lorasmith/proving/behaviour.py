"""Does the merged model behave as the adapter does? The same tokens, float32 on the stored weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from lorasmith.errors import CheckpointError, UsageError
from lorasmith.executors.local import work_through
from lorasmith.files.atomic import write_record
from lorasmith.models.arithmetic import Route, other_route, use_route
from lorasmith.models.batches import Batch, halve, make_batch, plan_batches
from lorasmith.models.divergence import TokenPairs, compare_logits
from lorasmith.models.encode import encode_examples
from lorasmith.models.forward import TokenForward
from lorasmith.models.load import LoadedModel, has_tokenizer, load_model
from lorasmith.models.loglik import open_forward, raise_non_finite
from lorasmith.models.memory import is_out_of_memory, release_memory
from lorasmith.models.session import ScoringOptions, Workload, describe_test_set, identify, prepare
from lorasmith.models.template import resolve_template
from lorasmith.progress import Progress, silent
from lorasmith.proving.behaviour_grade import grade, resolve_thresholds
from lorasmith.proving.behaviour_statistics import by_group, flips, per_example, summarise
from lorasmith.records.base import Finding
from lorasmith.records.proof import BehaviourProof

FLOOR_ROWS = 64
"""Rows on which the floor is measured, spread over all lengths: enough for its mean to a few percent."""

_ELEMENTS = 1 << 24
"""Logits of one model that exist at one time: 64 MB in float32; a comparison makes some eight such."""


def compare(
    base: Path,
    adapter: Path,
    merged: Path,
    test_set: Path,
    output: Path | None = None,
    *,
    template: str = "auto",
    loss_on: str = "response",
    end_of_turn: bool = True,
    device: str = "auto",
    arithmetic: str = "auto",
    batch_tokens: int | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    strict: bool = False,
    seed: int = 0,
    thresholds: Mapping[str, float] | None = None,
    progress: Progress = silent,
) -> BehaviourProof:
    """Compare the adapter on its base (PEFT's forward, model A) with the merged model (B), token by token.

    Both models are held in memory in float32. `output` is the file for the record, if any; `thresholds`
    replaces some of `behaviour_grade.THRESHOLDS`; the other options are those of validation. The floor is the
    adapter against itself: the same rows one at a time and, where the device has two float32 routes, by the
    other one, which adds in another order. Raises `CheckpointError` for models of different vocabulary.
    """
    if arithmetic == "bfloat16":
        raise UsageError(
            "bfloat16 arithmetic cannot tell the two models apart", expected="auto, mkl or onednn"
        )
    limits = resolve_thresholds(thresholds)
    options = ScoringOptions(
        template=template,
        loss_on=loss_on,
        end_of_turn=end_of_turn,
        device=device,
        arithmetic=arithmetic,
        batch_tokens=batch_tokens,
        max_length=max_length,
        limit=limit,
        strict=strict,
        seed=seed,
    )
    digest = describe_test_set(test_set)
    place, route = options.place()
    a = load_model(base, adapter=adapter, device=place)
    b = load_model(merged, device=place, tokenizer_from=merged if has_tokenizer(merged) else base)
    if a.vocabulary != b.vocabulary:
        raise CheckpointError(
            f"the merged model has {b.vocabulary:,} embedding rows, base and adapter {a.vocabulary:,}",
            where=merged,
            expected="two models of one vocabulary",
            remedy="merge this adapter into this base again",
        )
    work = prepare(test_set, a, options, route)
    obstacles, findings = _compare_tokenizers(work, b, options, merged)
    with ExitStack() as stack:
        forwards = [stack.enter_context(open_forward(model, work.rows, route)) for model in (a, b)]
        chunk = max(1, _ELEMENTS // a.vocabulary)
        rows = _all_pairs(work, forwards[0], forwards[1], chunk, progress)
        layouts = [f"batches of {work.settings.batch_tokens} tokens, {route.label}"]
        other = other_route(route, place)
        layouts.append(f"one row at a time, {other.label}")
        floor = summarise(_floor_pairs(work, forwards[0], chunk, other, progress), seed)
    overall = summarise(rows, seed)
    verdict, reasons = grade(overall, floor, limits, obstacles)
    proof = BehaviourProof(
        grade=verdict,
        reasons=reasons,
        thresholds=limits,
        a=identify("adapter", base, adapter, a),
        b=identify("merged", merged, None, b),
        test_set=digest,
        settings=work.settings,
        overall=overall,
        groups=by_group(work.examples, rows, seed),
        floor=floor,
        floor_layouts=layouts,
        flips=flips(work.examples, rows),
        examples=per_example(work.examples, rows),
        partial=work.partial,
        findings=[*work.findings, *findings],
    )
    if output is not None:
        write_record(output, proof)
    return proof


def _all_pairs(
    work: Workload, a: TokenForward, b: TokenForward, chunk: int, progress: Progress
) -> list[TokenPairs]:
    """The pairs of every row, in the order of the test set."""
    found: dict[int, TokenPairs] = {}
    with progress("Compare", total=work.tokens, unit="tok") as advance:
        for rows, pairs in work_through(
            work.batches(),
            lambda rows: _compare_batch(work, a, b, chunk, make_batch(rows, work.rows).to(a.device)),
            split=halve,
            out_of_memory=is_out_of_memory,
            release=release_memory,
        ):
            found.update(zip(rows, pairs, strict=True))
            advance(sum(len(work.rows[row].ids) for row in rows))
    return [found[row] for row in range(len(work.rows))]


def _compare_batch(
    work: Workload, a: TokenForward, b: TokenForward, chunk: int, batch: Batch
) -> list[TokenPairs]:
    """Both models on one batch; the pairs of each of its rows."""
    pairs = _pairs(a.logits(batch, chunk=chunk), b.logits(batch, chunk=chunk), batch)
    rows = _split(pairs, batch)
    for row, one in zip(batch.rows, rows, strict=True):
        for values, forward in ((one.logprob_a, a), (one.logprob_b, b)):
            if not np.isfinite(values).all():
                raise_non_finite(forward, batch, work.names[row])
    return rows


def _pairs(logits_a: Iterator[torch.Tensor], logits_b: Iterator[torch.Tensor], batch: Batch) -> TokenPairs:
    parts, start = [], 0
    for one, two in zip(logits_a, logits_b, strict=True):
        parts.append(compare_logits(one, two, batch.targets[start : start + len(one)]))
        start += len(one)
    return TokenPairs.join(parts)


def _split(pairs: TokenPairs, batch: Batch) -> list[TokenPairs]:
    found, start = [], 0
    for count in batch.counts:
        found.append(pairs.part(slice(start, start + count)))
        start += count
    return found


def _floor_pairs(
    work: Workload, forward: TokenForward, chunk: int, other: Route, progress: Progress
) -> list[TokenPairs]:
    """The adapter against itself on a sample of rows: in batches, and one row at a time by another route."""
    order = [row for batch in work.batches() for row in batch]
    sample = order[:: -(-len(order) // FLOOR_ROWS)]
    batches = plan_batches([len(work.rows[row].ids) for row in sample], work.settings.batch_tokens)
    found: list[TokenPairs] = []
    total = sum(len(work.rows[row].ids) for row in sample)
    with progress("Noise floor", total=total, unit="tok") as advance:
        for rows, pairs in work_through(
            [tuple(sample[place] for place in batch) for batch in batches],
            lambda rows: _floor_batch(work, forward, chunk, other, rows),
            split=halve,
            out_of_memory=is_out_of_memory,
            release=release_memory,
        ):
            found.extend(pairs)
            advance(sum(len(work.rows[row].ids) for row in rows))
    return found


def _floor_batch(
    work: Workload, forward: TokenForward, chunk: int, other: Route, rows: tuple[int, ...]
) -> list[TokenPairs]:
    batch = make_batch(rows, work.rows).to(forward.device)
    pieces = [min(chunk, count - start) for count in batch.counts for start in range(0, count, chunk)]
    together = forward.logits(batch, sizes=pieces)
    found = []
    for row in rows:
        alone = make_batch([row], work.rows).to(forward.device)

        def elsewhere(alone: Batch = alone) -> Iterator[torch.Tensor]:
            pending = forward.logits(alone, chunk=chunk)
            for _ in range(-(-alone.counts[0] // chunk)):
                with use_route(other):
                    logits = next(pending)
                yield logits

        found.append(_pairs(islice(together, -(-alone.counts[0] // chunk)), elsewhere(), alone))
    return found


def _compare_tokenizers(
    work: Workload, merged: LoadedModel, options: ScoringOptions, folder: Path
) -> tuple[list[str], list[Finding]]:
    """Would the merged folder put the same tokens to its model? Obstacles to a grade, and findings."""
    if not has_tokenizer(folder):
        finding = Finding(
            severity="warning",
            code="no-tokenizer",
            message="the merged folder has no tokenizer; the adapter's was used for both models",
            where=folder.name,
            remedy="copy the tokenizer files into it, or merge again",
        )
        return [], [finding]
    template = work.settings.template
    if resolve_template(merged.tokenizer, "auto") == "plain" and template == "chat":
        different = len(work.rows)
    else:
        own = encode_examples(
            work.examples,
            merged.tokenizer,
            template=template,
            end_of_turn=options.end_of_turn,
            max_length=work.settings.max_length,
            loss_on=options.loss_on,
        )
        different = sum(one.ids != two.ids for one, two in zip(work.rows, own.rows, strict=True))
    if not different:
        return [], []
    message = f"the merged folder's own tokenizer or chat template gives other tokens on {different} rows"
    finding = Finding(
        severity="error",
        code="tokenizer-differs",
        message=message,
        where=folder.name,
        expected="the tokenizer and the chat template that the adapter is used with",
        remedy="copy the tokenizer files and the chat template of the adapter into it, or merge again",
    )
    return [message], [finding]
