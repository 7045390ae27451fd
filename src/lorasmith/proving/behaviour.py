"""Does the merged model behave as the adapter does? The same tokens, float32 on the stored weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorasmith.errors import CheckpointError, UsageError
from lorasmith.files.atomic import write_record
from lorasmith.files.hub import local_model
from lorasmith.files.paths import StrPath
from lorasmith.models.encode import encode_examples
from lorasmith.models.load import LoadedModel, has_tokenizer, load_model
from lorasmith.models.session import (
    ScoringOptions,
    Workload,
    describe_test_set,
    identify,
    open_journal,
    prepare,
    route_of,
)
from lorasmith.models.template import resolve_template
from lorasmith.progress import Progress, silent
from lorasmith.proving.behaviour_generation import compare_generation
from lorasmith.proving.behaviour_grade import grade, resolve_thresholds
from lorasmith.proving.behaviour_measure import measure
from lorasmith.proving.behaviour_statistics import by_group, flips, per_example, summarise
from lorasmith.records.base import Finding
from lorasmith.records.proof import BehaviourProof


def compare(
    base: StrPath,
    adapter: StrPath,
    merged: StrPath,
    test_set: StrPath,
    output: StrPath | None = None,
    *,
    template: str = "auto",
    loss_on: str = "response",
    end_of_turn: bool = True,
    device: str = "auto",
    arithmetic: str = "auto",
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    strict: bool = False,
    seed: int = 0,
    thresholds: Mapping[str, float] | None = None,
    generate: int | None = None,
    progress: Progress = silent,
) -> BehaviourProof:
    """Compare the adapter on its base (PEFT's forward, model A) with the merged model (B), token by token.

    Both models are held in memory in float32. `output` is the file for the record, if any; `thresholds`
    replaces some of `behaviour_grade.THRESHOLDS`; the other options are those of validation. The floor is the
    adapter against itself: the same rows one at a time and, where the device has two float32 routes, by the
    other one, which adds in another order. `generate` also has both models write so many tokens at most
    after each prompt, greedily, and compares them. Raises `CheckpointError` for models of different
    vocabulary.
    """
    if arithmetic == "bfloat16":
        raise UsageError(
            "bfloat16 arithmetic cannot tell the two models apart", expected="auto, mkl or onednn"
        )
    adapter, merged, test_set = Path(adapter), Path(merged), Path(test_set)
    base = local_model(base, [adapter], progress=progress)
    output = None if output is None else Path(output)
    limits = resolve_thresholds(thresholds)
    options = ScoringOptions(
        template=template,
        loss_on=loss_on,
        end_of_turn=end_of_turn,
        device=device,
        arithmetic=arithmetic,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        max_length=max_length,
        limit=limit,
        shuffle_seed=shuffle_seed,
        strict=strict,
        seed=seed,
    )
    digest = describe_test_set(test_set)
    path = None if output is None else output.with_name(f".{output.name}.journal")
    with open_journal(path, [base, adapter, merged], digest, options) as journal:
        route = route_of(options, journal)
        a, b = _load_both(base, adapter, merged, options)
        work = prepare(test_set, a, options, route)
        obstacles, findings = _compare_tokenizers(work, b, merged)
        measured = measure(work, a, b, route, journal, progress)
        generation = None if generate is None else compare_generation(work, a, b, route, generate, progress)
        overall = summarise(measured.rows, seed)
        floor = summarise(measured.floor, seed)
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
            groups=by_group(work.examples, measured.rows, seed),
            floor=floor,
            floor_layouts=measured.layouts,
            flips=flips(work.examples, measured.rows),
            examples=per_example(work.examples, measured.rows),
            generation=generation,
            partial=work.partial,
            findings=[*work.findings, *findings],
        )
        if output is not None:
            write_record(output, proof)
        if journal:
            journal.remove()
    return proof


def _load_both(
    base: Path, adapter: Path, merged: Path, options: ScoringOptions
) -> tuple[LoadedModel, LoadedModel]:
    place, _ = options.place()
    a = load_model(base, adapter=adapter, device=place)
    b = load_model(merged, device=place, tokenizer_from=merged if has_tokenizer(merged) else base)
    if a.vocabulary != b.vocabulary:
        raise CheckpointError(
            f"the merged model has {b.vocabulary:,} embedding rows, base and adapter {a.vocabulary:,}",
            where=merged,
            expected="two models of one vocabulary",
            remedy="merge this adapter into this base again",
        )
    return a, b


def _compare_tokenizers(work: Workload, merged: LoadedModel, folder: Path) -> tuple[list[str], list[Finding]]:
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
            end_of_turn=work.settings.end_of_turn,
            max_length=work.settings.max_length,
            loss_on=work.settings.loss_on,
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
