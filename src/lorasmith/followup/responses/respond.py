"""Answers of a model to a whole training file: resumable, each row once, cut-off rows told early."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lorasmith.data.sources import local_rows
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
from lorasmith.models.chat_template import use_template
from lorasmith.models.conversation import Wording
from lorasmith.models.text import Frame, frame
from lorasmith.options import RespondOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Unwatched, Watcher
from lorasmith.records.base import FileDigest
from lorasmith.records.followup import RespondRecord, RespondSettings


@documented(RespondOptions)
def respond(
    model: StrPath,
    data: StrPath,
    output: StrPath,
    *,
    adapter: StrPath | None = None,
    options: RespondOptions | None = None,
    watcher: Watcher | None = None,
    loaded: Engine | None = None,
    executor: Executor | None = None,
    **given: Any,
) -> RespondRecord:
    """Answer every row of `data` (JSONL) and write the responses to `output` (JSONL) in the rows' order.

    `model` answers by itself, or with `adapter` on it, unmerged.

    Beside it: `NAME.json` (the record), `NAME.logprobs.parquet` where log-probabilities are wanted,
    `NAME.failed.jsonl` with the rows that have no answer, `NAME.timing.json`. Killed at any point, the same
    command goes on after the last finished row. Raises `UsageError` for an output begun with other settings,
    `DataError` for a file without prompts. `loaded` is an engine that is ready.

    `executor` is where rows are answered; this process by default. On a cluster, groups of rows are the
    chunks of work (`cluster.group_size`): a lost worker costs its group. Greedy texts are those of
    one process, log-probabilities are with `whole_groups`. `NAME.chunks.jsonl` tells of each group what
    computed it, those of commands that were broken off included; a finding says where that differs.
    """
    model = Path(model)
    places, options = Places(Path(output)), RespondOptions.given(options, given)
    places.require_own()
    data = local_rows(data, options, answered=False)
    rows = read_prompts(data, options.limit)
    adapter = None if adapter is None else Path(adapter)
    engine = loaded or choose_engine(model, adapter, options, executor)
    use_template(engine.tokenizer, options.chat_template)
    wording = Wording.of(options)
    around = frame(engine.tokenizer, options.template, end_of_turn=False)
    settings = _settings(model, adapter, engine, around, wording, options)
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
    model: Path,
    adapter: Path | None,
    engine: Engine,
    around: Frame,
    wording: Wording,
    options: RespondOptions,
) -> RespondSettings:
    return RespondSettings(
        model_sha256=digest_folder(model),
        adapter_sha256=None if adapter is None else digest_folder(adapter),
        engine=engine.name,
        dtype=engine.dtype,
        template=around.template,
        system=options.system,
        template_args=dict(wording.arguments),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed if options.temperature else 0,  # nothing is drawn
        top_logprobs=options.top_logprobs,
    )
