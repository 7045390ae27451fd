"""Does a draft model pay? Same output as greedy decoding, acceptance, measured and predicted speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lorasmith.data.sources import local_rows
from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import StrPath, write_record
from lorasmith.files.digests import describe, digest_folder
from lorasmith.files.output_folder import require_own_record
from lorasmith.followup.responses.engines import DTYPES, generation_route, resolve_dtype
from lorasmith.followup.responses.rows import read_prompts
from lorasmith.followup.speculation.loop import (
    Drafter,
    Greedy,
    LookupDrafter,
    ModelDrafter,
    Speculated,
    decode_greedy,
    decode_speculatively,
)
from lorasmith.machine.resources import hardware
from lorasmith.models.chat_template import use_template
from lorasmith.models.conversation import Wording
from lorasmith.models.device import resolve_device, use_route
from lorasmith.models.generation.generate import stop_tokens
from lorasmith.models.load import LoadedModel, load_model
from lorasmith.models.text import Frame, frame, question_tokens
from lorasmith.options import SpeculateOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.records.base import Finding
from lorasmith.records.followup import (
    Acceptance,
    SpeculationDifference,
    SpeculationRecord,
    SpeculationSetting,
    SpeculationSpeed,
    SpeculationTiming,
)

# What came of speculative decoding: equality with greedy decoding, acceptance, speed, and the advice.


WORTH = 1.05
"""Speed-up from which a way is recommended: repeated measurements differ by some per cent."""


@dataclass(frozen=True)
class Prompt:
    """One text to be answered."""

    id: str
    source: str
    tokens: list[int]


@dataclass(frozen=True)
class Way:
    """One way to draft: by method and tokens, with what came of each prompt."""

    method: str
    count: int
    drafter: Drafter
    texts: list[Speculated]


def predicted_speedup(alpha: float, count: int, cost: float, verify: float = 1.0) -> float:
    """(1 − αᵞ⁺¹) / ((1 − α)(γc + v)) of Leviathan et al. 2023, theorem 3.8; there v = 1.

    `alpha` is the acceptance rate, `count` γ, `cost` c, `verify` what the target's pass over a draft costs in
    steps of the target.
    """
    expected = count + 1.0 if alpha == 1 else (1 - alpha ** (count + 1)) / (1 - alpha)
    return expected / (count * cost + verify)


def make_record(
    ways: Sequence[Way],
    references: Sequence[Greedy],
    asked: Sequence[Prompt],
    target: Path,
    draft: Path | None,
    prompts: Path,
    how: tuple[str, str, int],
) -> SpeculationRecord:
    """The record; `how` is template, data type and the limit of new tokens."""
    noise = max(text.noise for way in ways for text in way.texts)
    settings, differences = [], []
    for way in ways:
        apart = []
        for prompt, reference, text in zip(asked, references, way.texts, strict=True):
            difference = _difference(way, prompt, reference, text, noise)
            if difference:
                apart.append(difference)
        differences += apart
        ties = sum(difference.tie for difference in apart)
        by_source: dict[str, list[Speculated]] = {}
        for prompt, text in zip(asked, way.texts, strict=True):
            by_source.setdefault(prompt.source, []).append(text)
        settings.append(
            SpeculationSetting(
                method=way.method,
                draft_tokens=way.count,
                overall=acceptance(way.texts),
                by_source={name: acceptance(texts) for name, texts in sorted(by_source.items())},
                equal=len(asked) - len(apart),
                ties=ties,
                different=len(apart) - ties,
            )
        )
    template, dtype, limit = how
    return SpeculationRecord(
        target_sha256=digest_folder(target),
        draft_sha256=None if draft is None else digest_folder(draft),
        prompts=describe([prompts], prompts.parent)[0],
        template=template,
        dtype=dtype,
        max_new_tokens=limit,
        noise=noise,
        settings=settings,
        differences=differences,
    )


def _difference(
    way: Way, prompt: Prompt, reference: Greedy, text: Speculated, noise: float
) -> SpeculationDifference | None:
    if text.tokens == reference.tokens:
        return None
    pairs = zip(reference.tokens, text.tokens, strict=False)
    place = next((n for n, (one, other) in enumerate(pairs) if one != other), len(text.tokens))
    _, _, value_one, value_other = reference.best[min(place, len(reference.best) - 1)]
    margin = value_one - value_other
    return SpeculationDifference(
        id=prompt.id,
        method=way.method,
        draft_tokens=way.count,
        place=place,
        margin=margin,
        noise=noise,
        tie=place < min(len(reference.tokens), len(text.tokens)) and margin <= 2 * noise,
    )


def acceptance(texts: Sequence[Speculated]) -> Acceptance:
    """The account of some texts together."""
    places = max(len(text.reached) for text in texts)
    reached = [sum(text.reached[place] for text in texts) for place in range(places)]
    accepted = [sum(text.accepted[place] for text in texts) for place in range(places)]
    tokens, passes = sum(len(text.tokens) for text in texts), sum(text.rounds for text in texts)
    return Acceptance(
        prompts=len(texts),
        tokens=tokens,
        rounds=passes,
        drafted=sum(text.drafted for text in texts),
        accepted=sum(accepted),
        acceptance_rate=sum(accepted) / sum(reached) if sum(reached) else None,
        accepted_length=tokens / passes,
        by_position=[good / all_ if all_ else None for good, all_ in zip(accepted, reached, strict=True)],
    )


def make_timing(
    ways: Sequence[Way], references: Sequence[Greedy], record: SpeculationRecord
) -> SpeculationTiming:
    """The speeds, apart from the record."""
    steps = [second for reference in references for second in reference.step_seconds]
    step = median(steps) if steps else sum(reference.seconds for reference in references)
    plain = sum(len(reference.tokens) for reference in references) / sum(
        reference.seconds for reference in references
    )
    speeds = [
        _speed(way, setting, references, step) for way, setting in zip(ways, record.settings, strict=True)
    ]
    pays, said = recommend(speeds)
    return SpeculationTiming(
        greedy_tokens_per_second=plain, speeds=speeds, pays=pays, recommendation=said, hardware=hardware()
    )


def _speed(
    way: Way, setting: SpeculationSetting, references: Sequence[Greedy], step: float
) -> SpeculationSpeed:
    rate = sum(len(text.tokens) for text in way.texts) / sum(text.seconds for text in way.texts)
    cost = (median(way.drafter.seconds) if way.drafter.seconds else 0.0) / step
    if way.method == "lookup":
        cost /= way.count  # one search gives the whole proposal
    passes = [second for text in way.texts for second in text.verify_seconds]
    verify = median(passes) / step if passes else None
    alpha = setting.overall.acceptance_rate
    return SpeculationSpeed(
        method=way.method,
        draft_tokens=way.count,
        tokens_per_second=rate,
        speedup=speedup(way.texts, references),
        draft_cost=cost,
        verify_cost=verify,
        predicted=None if alpha is None else predicted_speedup(alpha, way.count, cost),
        predicted_with_verify=(
            None if alpha is None or verify is None else predicted_speedup(alpha, way.count, cost, verify)
        ),
    )


def speedup(texts: Sequence[Speculated], references: Sequence[Greedy]) -> float:
    """How many times as fast as greedy decoding: the median over prompts, which are decoded by turns.

    A machine that is held up during one of them would move the ratio of the sums; texts may differ in length.
    """
    return median(
        (len(text.tokens) / text.seconds) / (len(one.tokens) / one.seconds)
        for text, one in zip(texts, references, strict=True)
    )


def recommend(speeds: Sequence[SpeculationSpeed]) -> tuple[bool, str]:
    """Whether any way pays, and the sentence that says which."""
    best = max(speeds, key=lambda speed: speed.speedup)
    name = "the draft model" if best.method == "draft" else "prompt lookup"
    if best.speedup < WORTH:
        return False, (
            f"speculative decoding does not pay here: the best way measured, {name} with "
            f"{best.draft_tokens} tokens, is {best.speedup:.2f} times as fast as plain decoding"
        )
    return True, f"use {name} with {best.draft_tokens} tokens: {best.speedup:.2f} times as fast"


_PROBE = "The quick brown fox: 3.14159 × 2\n\tdef f(x):\n        return [x, 'ä', \"日本\"]  # 🙂"


@documented(SpeculateOptions)
def speculate(
    target: StrPath,
    prompts: StrPath,
    *,
    draft: StrPath | None = None,
    output: StrPath | None = None,
    options: SpeculateOptions | None = None,
    progress: Progress = silent,
    **given: Any,
) -> tuple[SpeculationRecord, SpeculationTiming]:
    """Decode each prompt greedily, with drafts of each length, and with prompt lookup of each length.

    The ways take turns prompt by prompt, so that what else the machine does burdens all alike. `output`
    (a .json file) receives the record, its sibling `.timing.json` the speeds. Without a draft only prompt
    lookup is measured. Raises `UsageError` for a draft with another tokenizer.
    """
    target = Path(target)
    draft = None if draft is None else Path(draft)
    options = SpeculateOptions.given(options, given)
    prompts = local_rows(prompts, options, answered=False)
    if output is not None:
        require_own_record(Path(output))
    device = resolve_device(options.device)
    dtype = resolve_dtype(target, options.dtype, device.type)
    loaded = load_model(target, device=device, dtype=DTYPES[dtype])
    small = None
    if draft is not None:
        small = load_model(draft, device=device, dtype=DTYPES[dtype])
        require_same_tokenizer(loaded.tokenizer, small.tokenizer, draft)
    use_template(loaded.tokenizer, options.chat_template)
    around = frame(loaded.tokenizer, options.template, end_of_turn=False)
    asked, findings = _choose_prompts(prompts, loaded, around, options)
    stop = frozenset(stop_tokens(loaded, around.template))
    ways = _ways(small, options)
    with use_route(generation_route(dtype, device)):
        references = _measure(loaded, asked, ways, options.max_new_tokens, stop, progress)
    record = make_record(
        ways, references, asked, target, draft, prompts, (around.template, dtype, options.max_new_tokens)
    )
    record = record.model_copy(update={"findings": findings})
    timing = make_timing(ways, references, record)
    if output is not None:
        place = Path(output)
        write_record(place, record)
        write_record(place.with_name(place.name.removesuffix(".json") + ".timing.json"), timing)
    return record, timing


def require_same_tokenizer(target: Any, draft: Any, place: Path) -> None:
    """Raise `UsageError` unless every token id means the same to both; padding rows do not matter."""
    one, other = target.get_vocab(), draft.get_vocab()
    differ = {token for token in one.keys() | other.keys() if one.get(token) != other.get(token)}
    same_text = target(_PROBE)["input_ids"] == draft(_PROBE)["input_ids"]
    if not differ and same_text:
        return
    example = f", for example {sorted(differ)[0]!r}" if differ else " how text is cut"
    raise UsageError(
        f"the draft has another tokenizer: {len(differ)} tokens differ{example}",
        where=place,
        expected="the tokenizer of the target, id for id",
        remedy="take a draft of the same family, or cut one from the target: "
        "lorasmith draft train --from-target",
    )


def _choose_prompts(
    file: Path, loaded: LoadedModel, around: Frame, options: SpeculateOptions
) -> tuple[list[Prompt], list[Finding]]:
    """The prompts that leave room for the answer; what is left out is told. `DataError` when none is left."""
    rows = read_prompts(file, options.limit)
    wording = Wording.of(options)
    faulty = sum(bool(row.fault) for row in rows)
    asked = [
        Prompt(row.id, row.source, question_tokens(row.asked, loaded.tokenizer, around, wording))
        for row in rows
        if row.asked is not None
    ]
    most = (loaded.context or 1 << 62) - options.max_new_tokens
    fitting = [prompt for prompt in asked if len(prompt.tokens) <= most]
    if not fitting:
        raise DataError(
            "no prompt leaves room for the answer",
            where=file,
            expected=f"prompt and {options.max_new_tokens} new tokens within {loaded.context} tokens",
            remedy="lower --max-new-tokens",
        )
    findings = [
        Finding(severity="warning", code=code, message=f"{count} of {len(rows)} rows were left out: {why}")
        for code, count, why in (
            ("no-prompt", faulty, "they have no prompt"),
            ("no-room", len(asked) - len(fitting), "their prompts leave no room for the answer"),
        )
        if count
    ]
    return fitting, findings


def _ways(small: LoadedModel | None, options: SpeculateOptions) -> list[Way]:
    ways = []
    for count in sorted(set(options.draft_tokens)):
        if small is not None:
            ways.append(Way("draft", count, ModelDrafter(small), []))
        ways.append(Way("lookup", count, LookupDrafter(), []))
    return sorted(ways, key=lambda way: way.method)


def _measure(
    loaded: LoadedModel,
    asked: Sequence[Prompt],
    ways: Sequence[Way],
    limit: int,
    stop: frozenset[int],
    progress: Progress,
) -> list[Greedy]:
    references = []
    with progress("Speculating", total=len(asked) * (1 + len(ways)), unit="text") as advance:
        for prompt in asked:
            reference = decode_greedy(loaded, prompt.tokens, limit, stop)
            references.append(reference)
            advance(1)
            for way in ways:
                speculated = decode_speculatively(
                    loaded, way.drafter, prompt.tokens, way.count, limit, stop, reference
                )
                way.texts.append(speculated)
                advance(1)
    return references
