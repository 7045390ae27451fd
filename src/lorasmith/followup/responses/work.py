"""The rows of one extraction: which are done, which remain, in which order they go, and what came of them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from lorasmith.errors import DataError, LorasmithError
from lorasmith.executors.base import ChunkLog
from lorasmith.files.atomic import write_record
from lorasmith.files.jsonl import read_rows
from lorasmith.followup.responses.engines import Engine, Made
from lorasmith.followup.responses.output import (
    AnswersOrigin,
    Places,
    ResponseJournal,
    answer_arrays,
    earlier_failures,
    write_jsonl,
    write_logprobs,
)
from lorasmith.followup.responses.rows import Row
from lorasmith.machine.resources import hardware
from lorasmith.models.conversation import Wording
from lorasmith.models.generation.decoding import GeneratedAnswer, GenerationLimits, Request, Sampling
from lorasmith.models.text import Frame, question_tokens
from lorasmith.progress import Advance, Unwatched, Watcher
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.followup import LengthSummary, RespondRecord, RespondSettings, RespondTiming
from lorasmith.records.release import is_redacted
from lorasmith.records.scoring import ChunkRecord


def count_ends(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The counted fields of `RespondRecord`, from rows of the output."""
    finish: Counter[str] = Counter()
    lengths: list[int] = []
    repeating = prompt_tokens = 0
    for row in rows:
        finish[row["finish_reason"]] += 1
        lengths.append(row["response_tokens"])
        repeating += row["repeats"]
        prompt_tokens += row["prompt_tokens"]
    lengths.sort()
    return {
        "rows": len(lengths),
        "finish": dict(sorted(finish.items())),
        "cut_off": (len(lengths) - finish["stop"]) / len(lengths) if lengths else 0.0,
        "repeating": repeating,
        "prompt_tokens": prompt_tokens,
        "response_tokens": sum(lengths),
        "lengths": _summary(lengths),
    }


def speed_since_start(rows: int, tokens: int, seconds: float, price: float | None) -> RespondTiming:
    """How fast rows came since the command was started, and what that cost at a price per hour."""
    seconds = max(seconds, 1e-9)
    return RespondTiming(
        rows=rows,
        tokens=tokens,
        seconds=seconds,
        rows_per_second=rows / seconds,
        tokens_per_second=tokens / seconds,
        cost=None if price is None else price * seconds / 3600,
        hardware=hardware(),
    )


def _summary(lengths: list[int]) -> LengthSummary | None:
    if not lengths:
        return None
    last = len(lengths) - 1
    return LengthSummary(
        least=lengths[0], median=lengths[last // 2], p90=lengths[last * 9 // 10], most=lengths[-1]
    )


def not_in_data(count: int) -> Finding:
    """Responses of an earlier command whose rows are gone."""
    return Finding(
        severity="warning",
        code="rows-not-in-data",
        message=f"{count} responses of the earlier output belong to rows that the data no longer has; "
        "they are kept at its end",
        remedy="give another --output for another data file",
    )


def not_to_publish(rows: Sequence[Row]) -> Finding | None:
    """A warning where the output will hold questions whose authors ask that none appears in plain text."""
    sources = Counter(row.source for row in rows if is_redacted(row.source))
    if not sources:
        return None
    named = ", ".join(sorted(sources))
    return Finding(
        severity="warning",
        code="text-not-to-publish",
        message=f"the responses will hold {sources.total()} rows of {named} in plain text, prompts included; "
        "its authors ask that none of it appears where a crawler could find it",
        remedy="keep the output to yourself: packages and reports hide such rows, this file does not",
    )


def answered_before(done: int, rows: int) -> Finding:
    """How much of the data an earlier command has answered."""
    return Finding(
        severity="note", code="answered-before", message=f"{done} of {rows} rows were answered before"
    )


# Is the limit of new tokens large enough? Asked after the first hundred rows, not after ten hours.


CHECK_ROWS = 100
"""A share of cut rows is then known to within 10 points (95 %, binomial), enough to see that it is wrong."""
TOLERATED = 0.02
"""Share of cut rows above which a warning is due; the suggested limit aims at half of it."""
_STEP = 64
_LONGEST_CYCLE = 48
_REPEATS = 4


@dataclass(frozen=True)
class Length:
    """How one row ended."""

    tokens: int
    cut: bool
    repeats: bool
    """Cut in the middle of a loop: no limit is long enough for it."""


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether the text ends in the same few tokens, four times over."""
    for cycle in range(1, min(_LONGEST_CYCLE, len(tokens) // _REPEATS) + 1):
        tail = tokens[-cycle * _REPEATS :]
        if all(tail[place] == tail[place + cycle] for place in range(len(tail) - cycle)):
            return True
    return False


def judge_limit(lengths: Sequence[Length], limit: int, most: int | None) -> Finding | None:
    """A warning with a suggested limit when more than `TOLERATED` of these rows were cut, else None.

    `most` is the largest limit that the model's context leaves. The suggestion takes the ends of the rows for
    a constant hazard h, estimated as the number of rows that ended over the tokens of all rows (the maximum
    likelihood estimate for lengths cut off on the right), so that a share c cut at L leaves a share
    c·exp(−h·(L' − L)) cut at L'.
    """
    cut = sum(length.cut for length in lengths)
    if not lengths or cut / len(lengths) <= TOLERATED:
        return None
    loops = sum(length.repeats for length in lengths)
    message = (
        f"{cut} of the first {len(lengths)} rows ({cut / len(lengths):.0%}) were cut off at {limit} tokens"
    )
    if loops:
        message += f"; of these, {loops} went round in a loop, which a larger limit does not mend"
    suggested = suggest_limit(lengths, limit)
    # Three different remedies: only a full context may be called full, and no limit ends a loop.
    if suggested <= limit:
        remedy = "nearly all of them repeat themselves: look at these rows, at the template and the sampling"
    elif most is not None and most <= limit:
        remedy = "the model's context leaves no larger limit: shorten the prompts, or take a model that stops"
    else:
        wanted = suggested if most is None else min(suggested, most)
        remedy = f"give --max-new-tokens {wanted} and another --output"
    return Finding(severity="warning", code="cut-off", message=message, expected="2 % or less", remedy=remedy)


def suggest_limit(lengths: Sequence[Length], limit: int) -> int:
    """The limit that should leave half of `TOLERATED` cut; loops are left out of the reckoning."""
    sound = [length for length in lengths if not length.repeats]
    cut = sum(length.cut for length in sound)
    ended = len(sound) - cut
    if not cut:
        return limit
    if not ended:
        return 4 * limit  # nothing is known but that it is too small
    hazard = ended / sum(length.tokens for length in sound)
    more = math.log(cut / len(sound) / (TOLERATED / 2)) / hazard
    return math.ceil((limit + more) / _STEP) * _STEP


# What computed each answer, from the first command of an extraction to the last.


def earlier_origins(places: Places) -> dict[str, AnswersOrigin]:
    """Where a finished output's answers come from, by key, as far as its chunks tell."""
    if not places.chunks.exists():
        return {}
    origins = {}
    for number, line in read_rows(places.chunks):
        try:
            chunk = ChunkRecord.model_validate(line)
        except ValidationError as error:
            raise DataError(
                f"line {number} tells of no chunk",
                where=places.chunks,
                expected="the file as it was written",
                remedy="remove it; what is made from now on is told of",
            ) from error
        for key in chunk.keys or ():
            origins[key] = AnswersOrigin(f"earlier {number}", chunk.conditions)
    return origins


def origin_of(made: Made | None, keys: Sequence[str]) -> AnswersOrigin | None:
    """What an engine tells, with the rows' keys in place of their numbers."""
    if made is None:
        return None
    return AnswersOrigin(keys[made.rows[0]] if made.rows else "", made.conditions)


def chunk_log(keys: Sequence[str], finished: Iterable[str], origins: Mapping[str, AnswersOrigin]) -> ChunkLog:
    """The answers with these keys as chunks of rows of the data, whose keys are `keys`."""
    wanted = set(finished)
    chunks: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(keys):
        if key in wanted and (origin := origins.get(key)):
            chunks.setdefault((origin.group, origin.conditions.model_dump_json()), []).append(row)
    log = ChunkLog()
    for rows in chunks.values():
        log.note(tuple(rows), origins[keys[rows[0]]].conditions)
    return log


GROUP_ROWS = 128
"""Rows of a group that is answered as a whole. A kill loses half of it on average; of 16 rows under way, the
slow end of each group, where slots run empty, is an eighth."""


class ResponseWork:
    """One command's rows: which are done, which remain, in which order they go."""

    def __init__(
        self,
        rows: list[Row],
        settings: RespondSettings,
        places: Places,
        journal: ResponseJournal,
        engine: Engine,
        around: Frame,
        earlier: dict[str, dict[str, Any]],
    ) -> None:
        self.rows, self.settings, self.places, self.journal = rows, settings, places, journal
        self.engine, self.around = engine, around
        self.watcher: Watcher = Unwatched()
        self._row_ended: Advance = lambda rows: None
        self.keys = [row.key(settings) for row in rows]
        self.earlier = earlier
        known = earlier_failures(places) if places.record.exists() else {}
        known.update({key: journal.row(key) for key, kept in journal.rows.items() if kept.failed})
        present = set(self.keys) - set(earlier)
        self.failures = {key: row for key, row in known.items() if key in present}
        """Rows of this data that failed; one that was mended in the data is another row."""
        self.stop = engine.stops(around.template)
        pilot = sorted(range(len(rows)), key=lambda index: self.keys[index])[:CHECK_ROWS]
        self.pilot = frozenset(pilot)
        """The rows that go first: keys are hashes, so these are a random sample, the same after a restart."""
        self.lengths: dict[int, Length] = {}
        self.longest = 0
        """Tokens of the longest prompt among them."""
        self.checked = False
        self.findings: list[Finding] = []
        self.new_rows = self.new_tokens = 0
        self.prompts: dict[int, list[int]] = {}
        self.whole_groups = False

    def forget_failures(self) -> None:
        """Try rows again that failed before."""
        self.failures.clear()
        for key in [key for key, kept in self.journal.rows.items() if kept.failed]:
            del self.journal.rows[key]

    def finished(self, key: str) -> dict[str, Any] | None:
        """The output row of a key, of this command or an earlier one."""
        kept = self.journal.rows.get(key)
        if kept is not None and not kept.failed:
            return self.journal.row(key)
        return self.earlier.get(key)

    def run(self) -> None:
        """Answer what remains: the check's rows first, each part longest prompt first."""
        if hidden := not_to_publish(self.rows):
            self._tell(hidden)
        missing = [index for index, key in enumerate(self.keys) if self._missing(key)]
        # Whole groups are cut from all rows, done or not: a restart then has the same rows in the same group,
        # and so the same batches, on which the last digits of log-probabilities depend.
        ready, faults = self._ready(range(len(self.rows)) if self.whole_groups else missing)
        size = GROUP_ROWS if self.whole_groups else max(1, len(ready))
        groups = [ready[start : start + size] for start in range(0, len(ready), size)]
        groups = [group for group in groups if any(self._missing(self.keys[index]) for index in group)]
        for index in (index for group in groups for index in group):
            self.journal.rows.pop(self.keys[index], None)  # the rest of a group that a kill tore
        for index, key in enumerate(self.keys):
            row = self.finished(key)
            if row is not None:
                self._note(index, row)
        remaining = sum(len(group) for group in groups) + len(faults)
        if before := len(self.rows) - remaining:
            self.watcher.show("respond", answered_before(before, len(self.rows)))
        with self.watcher.progress("Respond", total=remaining, unit="row") as self._row_ended:
            for index, reason in faults:
                self._fail(index, reason)
            self._answer(groups)
        self._check(final=True)

    def _answer(self, groups: list[list[int]]) -> None:
        sampling = Sampling(
            self.settings.temperature, self.settings.top_p, self.settings.top_k, self.settings.seed
        )
        limits = GenerationLimits(self.settings.max_new_tokens, self.stop, self.settings.top_logprobs)
        if self.engine.cuts:  # it makes groups by itself, for workers of which nothing is known here
            groups = [[index for group in groups for index in group]]
        for group in groups:
            requests = (self._request(index) for index in group)
            for answer in self.engine.answers(requests, limits, sampling, self._tokens):
                self._keep(answer)

    def _missing(self, key: str) -> bool:
        return self.finished(key) is None and key not in self.failures

    def _ready(self, remaining: Iterable[int]) -> tuple[list[int], list[tuple[int, str]]]:
        """Those of these rows that have a prompt, the check's rows first, then by length; others with why."""
        ready, faults = [], []
        for index in remaining:
            row = self.rows[index]
            if self.keys[index] in self.failures:
                continue
            try:
                if row.fault:
                    raise DataError(row.fault)
                assert row.asked is not None, "a row without a fault asks something"
                wording = Wording(self.settings.system, self.settings.template_args)
                self.prompts[index] = question_tokens(row.asked, self.engine.tokenizer, self.around, wording)
            except LorasmithError as error:
                faults.append((index, error.found))
            else:
                ready.append(index)
        # The longest first: at the end short rows fill the slots, and a lack of memory shows at once.
        ready.sort(key=lambda index: (index not in self.pilot, -len(self.prompts[index]), index))
        return ready, faults

    def _request(self, index: int) -> Request:
        seed = int(hashlib.sha256(f"{self.settings.seed}:{self.keys[index]}".encode()).hexdigest()[:16], 16)
        return Request(index, self.prompts[index], seed)

    def _tokens(self, count: int) -> None:
        self.new_tokens += count
        self.watcher.generated(count)

    def _keep(self, answer: GeneratedAnswer) -> None:
        index = answer.index
        if answer.finish == "failed":
            self._fail(index, answer.error)
            return
        prompt = self.prompts.pop(index)
        arrays = answer_arrays(prompt, answer) if self.settings.top_logprobs else []
        row = self._row(index, answer, len(prompt))
        self.journal.add(row, arrays, origin=origin_of(self.engine.made(), self.keys))
        self.new_rows += 1
        self._note(index, row)
        self._row_ended(1)
        self._check()

    def _row(self, index: int, answer: GeneratedAnswer, prompt_tokens: int) -> dict[str, Any]:
        row = self.rows[index]
        single = len(row.messages) == 1
        metadata = row.value.get("metadata")
        return {
            "id": row.id,
            **({"prompt": row.messages[0]["content"]} if single else {"messages": row.messages}),
            "response": self.engine.tokenizer.decode(answer.tokens, skip_special_tokens=True),
            "finish_reason": answer.finish,
            "prompt_tokens": prompt_tokens,
            "response_tokens": len(answer.tokens),
            "repeats": answer.finish != "stop" and is_loop(answer.tokens),
            "key": self.keys[index],
            "metadata": metadata if isinstance(metadata, dict) else {},
            "input": row.value,
        }

    def _fail(self, index: int, reason: str) -> None:
        row = self.rows[index]
        body = {
            "id": row.id,
            "line": row.number,
            "error": reason,
            "key": self.keys[index],
            "input": row.value,
        }
        self.journal.add(body, [], failed=True)
        self.failures[self.keys[index]] = body
        self._row_ended(1)

    def _note(self, index: int, row: Mapping[str, Any]) -> None:
        if index in self.pilot:
            self.longest = max(self.longest, row["prompt_tokens"])
            self.lengths[index] = Length(
                row["response_tokens"], row["finish_reason"] != "stop", row["repeats"]
            )

    def _check(self, *, final: bool = False) -> None:
        """Judge the limit once, when the last of the check's rows has ended."""
        if self.checked:
            return
        awaited = sum(self.keys[index] not in self.failures for index in self.pilot)
        if not final and len(self.lengths) < awaited:
            return
        self.checked = True
        context = self.engine.context
        most = None if context is None else max(1, context - self.longest)
        finding = judge_limit(list(self.lengths.values()), self.settings.max_new_tokens, most)
        if finding:
            self._tell(finding)

    def _tell(self, finding: Finding) -> None:
        """Say it at once, and keep it for the record."""
        self.findings.append(finding)
        self.watcher.show("respond", finding)

    def publish(self, data: FileDigest) -> RespondRecord:
        """Write output, log-probabilities, failed rows, what computed them, and last the record."""
        done = [key for key in self.keys if self.finished(key) is not None]
        log = chunk_log(self.keys, done, {**earlier_origins(self.places), **self.journal.origins})
        self.findings += log.findings()
        log.write(self.places.chunks, wanted=self.engine.cuts or self.places.chunks.exists(), keys=self.keys)
        listed = set(done)
        other = [key for key in [*self.earlier, *self.journal.rows] if key not in listed]
        kept = [key for key in dict.fromkeys(other) if self.finished(key) is not None]
        if kept:
            self.findings.append(not_in_data(len(kept)))
        every = [*done, *kept]
        output = write_jsonl(self.places.output, (self._finished(key) for key in every))
        logprobs = None
        if self.settings.top_logprobs:
            names = {key: self._finished(key) for key in every if key in self.journal.rows}
            logprobs = write_logprobs(self.places.logprobs, every, self.journal, names)
        if self.failures:
            order = {key: place for place, key in enumerate(self.keys)}
            failed = sorted(self.failures.values(), key=lambda row: order.get(row["key"], len(order)))
            write_jsonl(self.places.failed, failed)
        else:
            self.places.failed.unlink(missing_ok=True)
        record = RespondRecord(
            settings=self.settings,
            data=data,
            output=output,
            logprobs=logprobs,
            failed=len(self.failures),
            findings=self.findings,
            **count_ends(self._finished(key) for key in every),
        )
        write_record(self.places.record, record)
        return record

    def _finished(self, key: str) -> dict[str, Any]:
        row = self.finished(key)
        assert row is not None
        return row
