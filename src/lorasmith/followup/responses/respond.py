"""Answers of a model to a whole training file: resumable, each row once, cut-off rows told early."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.errors import UsageError
from lorasmith.executors.base import Executor
from lorasmith.files.atomic import StrPath, write_record
from lorasmith.files.digests import digest_folder, sha256_file
from lorasmith.followup.responses.cluster import ClusterEngine
from lorasmith.followup.responses.engines import Engine, open_engine
from lorasmith.followup.responses.output import Places, ResponseJournal, earlier_rows
from lorasmith.followup.responses.rows import read_prompts
from lorasmith.followup.responses.work import (
    GROUP_ROWS,
    ResponseWork,
    speed_since_start,
)
from lorasmith.models.generation.decoding import Sampling
from lorasmith.models.load import check_device_map
from lorasmith.models.text import Frame, frame
from lorasmith.progress import Unwatched, Watcher
from lorasmith.records.base import FileDigest
from lorasmith.records.followup import RespondRecord, RespondSettings


@dataclass(frozen=True)
class RespondOptions:
    """What a caller of `respond` may choose."""

    adapter: StrPath | None = None
    engine: str = "transformers"
    template: str = "auto"
    system: str | None = None
    max_new_tokens: int = 1024
    sampling: Sampling = field(default_factory=Sampling)
    top_logprobs: int = 0
    batch_size: int | None = None
    device: str = "auto"
    device_map: str | None = None
    """`auto` spreads a model that is too large for one GPU over all of them, memory and disk."""
    dtype: str = "auto"
    limit: int | None = None
    """Only the first rows of the file."""
    retry_failed: bool = False
    whole_groups: bool = False
    """Answer rows in groups that a kill does not tear: stored log-probabilities are then the same bytes after
    it, at the price of up to `GROUP_ROWS` rows that are answered again, and of each group's slow end."""
    price_per_hour: float | None = None

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        self.sampling.check()
        check_device_map(self.device_map)
        for name, value, least in (
            ("max_new_tokens", self.max_new_tokens, 1),
            ("top_logprobs", self.top_logprobs, 0),
            ("limit", self.limit, 1),
            ("price_per_hour", self.price_per_hour, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} is {value}", expected=f"{least} or more")


def respond(
    model: StrPath,
    data: StrPath,
    output: StrPath,
    *,
    options: RespondOptions | None = None,
    watcher: Watcher | None = None,
    engine: Engine | None = None,
    executor: Executor | None = None,
) -> RespondRecord:
    """Answer every row of `data` (JSONL) and write the responses to `output` (JSONL) in the rows' order.

    Beside it: `NAME.json` (the record), `NAME.logprobs.parquet` where log-probabilities are wanted,
    `NAME.failed.jsonl` with the rows that have no answer, `NAME.timing.json`. Killed at any point, the same
    command goes on after the last finished row. Raises `UsageError` for an output begun with other settings,
    `DataError` for a file without prompts. `engine` is one already loaded.

    `executor` is where rows are answered; this process by default. On a cluster, groups of rows are the
    chunks of work (`cluster.group_size`): a lost worker costs its group. Greedy texts are those of
    one process, log-probabilities are with `whole_groups`. `NAME.chunks.jsonl` tells of each group what
    computed it, those of commands that were broken off included; a finding says where that differs.
    """
    model, data = Path(model), Path(data)
    places, options = Places(Path(output)), options or RespondOptions()
    options.check()
    rows = read_prompts(data, options.limit)
    adapter = None if options.adapter is None else Path(options.adapter)
    engine = engine or choose_engine(model, adapter, options, executor)
    around = frame(engine.tokenizer, options.template, end_of_turn=False)
    settings = _settings(model, adapter, engine, around, options)
    earlier = earlier_rows(places, settings)  # refuses a foreign output before anything is written
    with ResponseJournal(places.journal, settings.model_dump()) as journal:
        work = ResponseWork(rows, settings, places, journal, engine, around, earlier)
        work.watcher = watcher or Unwatched()
        work.whole_groups = options.whole_groups and options.top_logprobs > 0
        if options.retry_failed:
            work.forget_failures()
        began = time.monotonic()
        work.run()
        seconds = time.monotonic() - began
        record = work.publish(FileDigest(path=data.name, bytes=data.stat().st_size, sha256=sha256_file(data)))
        if work.new_rows:
            speed = speed_since_start(work.new_rows, work.new_tokens, seconds, options.price_per_hour)
            write_record(places.timing, speed)
        journal.remove()
    return record


def choose_engine(
    model: Path, adapter: Path | None, options: RespondOptions, executor: Executor | None = None
) -> Engine:
    """The engine that is asked for, or one that hands the rows to a cluster's workers."""
    chosen: dict[str, Any] = {
        "device": options.device,
        "device_map": options.device_map,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
    }
    if executor is None or not executor.remote:
        return open_engine(options.engine, model, adapter, **chosen)
    if options.engine != "transformers":
        raise UsageError(f"the {options.engine} engine does not run on a cluster", expected="transformers")
    whole = GROUP_ROWS if options.whole_groups and options.top_logprobs else None
    return ClusterEngine(executor, model, adapter, group_rows=whole, **chosen)


def _settings(
    model: Path, adapter: Path | None, engine: Engine, around: Frame, options: RespondOptions
) -> RespondSettings:
    return RespondSettings(
        model_sha256=digest_folder(model),
        adapter_sha256=None if adapter is None else digest_folder(adapter),
        engine=engine.name,
        dtype=engine.dtype,
        template=around.template,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        temperature=options.sampling.temperature,
        top_p=options.sampling.top_p,
        top_k=options.sampling.top_k,
        seed=0 if options.sampling.greedy else options.sampling.seed,
        top_logprobs=options.top_logprobs,
    )
