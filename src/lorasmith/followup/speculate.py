"""Does a draft model pay? Same output as greedy decoding, acceptance, measured and predicted speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import write_record
from lorasmith.files.paths import StrPath
from lorasmith.followup.respond_engines import DTYPES, generation_route, resolve_dtype
from lorasmith.followup.respond_rows import read_prompts
from lorasmith.followup.speculate_account import Prompt, Way, make_record, make_timing
from lorasmith.followup.speculate_loop import (
    Greedy,
    LookupDrafter,
    ModelDrafter,
    decode_greedy,
    decode_speculatively,
)
from lorasmith.models.arithmetic import resolve_device, use_route
from lorasmith.models.generate import stop_tokens
from lorasmith.models.load import LoadedModel, load_model
from lorasmith.models.template import Frame, frame
from lorasmith.models.turns import conversation_tokens
from lorasmith.progress import Progress, silent
from lorasmith.records.base import Finding
from lorasmith.records.followup import SpeculationRecord, SpeculationTiming

_PROBE = "The quick brown fox: 3.14159 × 2\n\tdef f(x):\n        return [x, 'ä', \"日本\"]  # 🙂"


@dataclass(frozen=True)
class SpeculateOptions:
    """What a caller may choose."""

    draft_tokens: tuple[int, ...] = (2, 4, 6)
    max_new_tokens: int = 128
    limit: int | None = 20
    """Prompts from the beginning of the file; None for all."""
    template: str = "auto"
    device: str = "auto"
    dtype: str = "float32"

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        for name, values in (
            ("draft_tokens", self.draft_tokens or (0,)),
            ("max_new_tokens", (self.max_new_tokens,)),
            ("limit", (1 if self.limit is None else self.limit,)),
        ):
            if min(values) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {min(values)}", expected="1 or more")


def speculate(
    target: StrPath,
    prompts: StrPath,
    *,
    draft: StrPath | None = None,
    output: StrPath | None = None,
    options: SpeculateOptions | None = None,
    progress: Progress = silent,
) -> tuple[SpeculationRecord, SpeculationTiming]:
    """Decode each prompt greedily, with drafts of each length, and with prompt lookup of each length.

    The ways take turns prompt by prompt, so that what else the machine does burdens all alike. `output`
    (a .json file) receives the record, its sibling `.timing.json` the speeds. Without a draft only prompt
    lookup is measured. Raises `UsageError` for a draft with another tokenizer.
    """
    target, prompts = Path(target), Path(prompts)
    draft = None if draft is None else Path(draft)
    options = options or SpeculateOptions()
    options.check()
    device = resolve_device(options.device)
    dtype = resolve_dtype(target, options.dtype, device.type)
    loaded = load_model(target, device=device, dtype=DTYPES[dtype])
    small = None
    if draft is not None:
        small = load_model(draft, device=device, dtype=DTYPES[dtype])
        require_same_tokenizer(loaded.tokenizer, small.tokenizer, draft)
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
    faulty = sum(bool(row.fault) for row in rows)
    asked = [
        Prompt(row.id, row.source, conversation_tokens(loaded.tokenizer, row.messages, around))
        for row in rows
        if not row.fault
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
                found = decode_speculatively(
                    loaded, way.drafter, prompt.tokens, way.count, limit, stop, reference
                )
                way.texts.append(found)
                advance(1)
    return references
