"""The rows of one extraction: which are done, which remain, in which order they go, and what came of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from lorasmith.errors import DataError, LorasmithError
from lorasmith.files.atomic import write_record
from lorasmith.followup.respond_engines import Engine
from lorasmith.followup.respond_figures import count_ends, not_in_data
from lorasmith.followup.respond_limit import CHECK_ROWS, Length, is_loop, judge_limit
from lorasmith.followup.respond_made import chunk_log, earlier_origins, origin_of
from lorasmith.followup.respond_output import (
    Places,
    earlier_failures,
    pack_arrays,
    write_jsonl,
    write_logprobs,
)
from lorasmith.followup.respond_rows import Row
from lorasmith.followup.respond_store import Store
from lorasmith.followup.respond_watch import RespondWatcher, Unwatched
from lorasmith.models.requests import Answer, Limits, Request
from lorasmith.models.sampling import Sampling
from lorasmith.models.template import Frame
from lorasmith.models.turns import conversation_tokens
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.followup import RespondRecord, RespondSettings

GROUP_ROWS = 128
"""Of a group that is answered as a whole. A kill loses half of it on average; of 16 rows under way, the slow
end of each group, where slots run empty, is an eighth."""


class Work:
    """One command's rows: which are done, which remain, in which order they go."""

    def __init__(
        self,
        rows: list[Row],
        settings: RespondSettings,
        places: Places,
        store: Store,
        engine: Engine,
        around: Frame,
        earlier: dict[str, dict[str, Any]],
    ) -> None:
        self.rows, self.settings, self.places, self.store = rows, settings, places, store
        self.engine, self.around = engine, around
        self.watcher: RespondWatcher = Unwatched()
        self.keys = [row.key(settings) for row in rows]
        self.earlier = earlier
        known = earlier_failures(places) if places.record.exists() else {}
        known.update({key: store.row(key) for key, kept in store.rows.items() if kept.failed})
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
        for key in [key for key, kept in self.store.rows.items() if kept.failed]:
            del self.store.rows[key]

    def finished(self, key: str) -> dict[str, Any] | None:
        """The output row of a key, of this command or an earlier one."""
        kept = self.store.rows.get(key)
        if kept is not None and not kept.failed:
            return self.store.row(key)
        return self.earlier.get(key)

    def run(self) -> None:
        """Answer what remains: the check's rows first, each part longest prompt first."""
        missing = [index for index, key in enumerate(self.keys) if self._missing(key)]
        ready, faults = self._ready(range(len(self.rows)) if self.whole_groups else missing)
        size = GROUP_ROWS if self.whole_groups else max(1, len(ready))
        groups = [ready[start : start + size] for start in range(0, len(ready), size)]
        groups = [group for group in groups if any(self._missing(self.keys[index]) for index in group)]
        for index in (index for group in groups for index in group):
            self.store.rows.pop(self.keys[index], None)  # the rest of a group that a kill tore
        for index, key in enumerate(self.keys):
            row = self.finished(key)
            if row is not None:
                self._note(index, row)
        self.watcher.began(len(self.rows), len(self.rows) - sum(len(group) for group in groups) - len(faults))
        for index, reason in faults:
            self._fail(index, reason)
        sampling = Sampling(
            self.settings.temperature, self.settings.top_p, self.settings.top_k, self.settings.seed
        )
        limits = Limits(self.settings.max_new_tokens, self.stop, self.settings.top_logprobs)
        if self.engine.cuts:
            groups = [[index for group in groups for index in group]]
        for group in groups:
            requests = (self._request(index) for index in group)
            for answer in self.engine.answers(requests, limits, sampling, self._tokens):
                self._keep(answer)
        self._check(final=True)

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
                messages = row.messages
                if self.settings.system is not None and messages[0]["role"] != "system":
                    messages = [{"role": "system", "content": self.settings.system}, *messages]
                self.prompts[index] = conversation_tokens(self.engine.tokenizer, messages, self.around)
            except LorasmithError as error:
                faults.append((index, error.found))
            else:
                ready.append(index)
        ready.sort(key=lambda index: (index not in self.pilot, -len(self.prompts[index]), index))
        return ready, faults

    def _request(self, index: int) -> Request:
        seed = int(hashlib.sha256(f"{self.settings.seed}:{self.keys[index]}".encode()).hexdigest()[:16], 16)
        return Request(index, self.prompts[index], seed)

    def _tokens(self, count: int) -> None:
        self.new_tokens += count
        self.watcher.moved(0, count)

    def _keep(self, answer: Answer) -> None:
        index = answer.index
        if answer.finish == "failed":
            self._fail(index, answer.error)
            return
        prompt = self.prompts.pop(index)
        arrays = pack_arrays(prompt, answer) if self.settings.top_logprobs else []
        row = self._row(index, answer, len(prompt))
        self.store.add(row, arrays, origin=origin_of(self.engine.made(), self.keys))
        self.new_rows += 1
        self._note(index, row)
        self.watcher.moved(1, 0)
        self._check()

    def _row(self, index: int, answer: Answer, prompt_tokens: int) -> dict[str, Any]:
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
        self.store.add(body, [], failed=True)
        self.failures[self.keys[index]] = body
        self.watcher.moved(1, 0)

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
            self.findings.append(finding)
            self.watcher.found(finding)

    def publish(self, data: FileDigest) -> RespondRecord:
        """Write output, log-probabilities, failed rows, what computed them, and last the record."""
        done = [key for key in self.keys if self.finished(key) is not None]
        log = chunk_log(self.keys, done, {**earlier_origins(self.places), **self.store.origins})
        self.findings += log.findings()
        log.write(self.places.chunks, wanted=self.engine.cuts or self.places.chunks.exists(), keys=self.keys)
        listed = set(done)
        other = [key for key in [*self.earlier, *self.store.rows] if key not in listed]
        kept = [key for key in dict.fromkeys(other) if self.finished(key) is not None]
        if kept:
            self.findings.append(not_in_data(len(kept)))
        every = [*done, *kept]
        output = write_jsonl(self.places.output, (self._finished(key) for key in every))
        logprobs = None
        if self.settings.top_logprobs:
            names = {key: self._finished(key) for key in every if key in self.store.rows}
            logprobs = write_logprobs(self.places.logprobs, every, self.store, names)
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
