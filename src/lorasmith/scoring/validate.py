"""Validation: loss and perplexity of one model on one test set, by group, with every token kept."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

from lorasmith.errors import UsageError, os_errors
from lorasmith.executors.base import Executor, Local, Recipe
from lorasmith.executors.log import ChunkLog
from lorasmith.files.atomic import write_bytes, write_record
from lorasmith.files.hub import local_model
from lorasmith.files.journal import Journal
from lorasmith.files.paths import StrPath
from lorasmith.models.arithmetic import Route
from lorasmith.models.inputs import Inputs
from lorasmith.models.load import LoadedModel
from lorasmith.models.loglik import Floats, open_forward
from lorasmith.models.replica import OPEN_SCORING, Replica
from lorasmith.models.session import (
    ScoringOptions,
    Workload,
    identify,
    open_journal,
    prepare,
    route_of,
)
from lorasmith.models.states import open_states, scoring_work
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest
from lorasmith.records.scoring import ModelIdentity, ValidationResult
from lorasmith.scoring.aggregate import aggregate, example_table

ROLES = ("base", "adapter", "merged")


def validate(
    model: StrPath,
    test_set: StrPath,
    output: StrPath,
    *,
    adapter: StrPath | None = None,
    role: str | None = None,
    template: str = "auto",
    loss_on: str = "response",
    end_of_turn: bool = True,
    device: str = "auto",
    device_map: str | None = None,
    arithmetic: str = "auto",
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    strict: bool = False,
    seed: int = 0,
    states: StrPath | None = None,
    keep_journal: bool = False,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> ValidationResult:
    """Score the model in `model`, with `adapter` on it unless None, on every response of `test_set`.

    Writes `{role}.json` and `{role}.parquet` into `output`; `role` is `base`, `adapter` or `merged`, by
    default the one of the first two that `adapter` says.

    - `template`: `chat`, `plain`, or `auto` for chat where the tokenizer has a template.
    - `loss_on`: `response`, or `all` for the loss over prompt and response.
    - `end_of_turn`: whether the token that ends the response is scored as well.
    - `device`: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; `device_map`: `auto` spreads a model that is too large
      for one GPU over all of them, memory and disk. `arithmetic`: `auto` (float32 by the faster route),
      `mkl`, `onednn` or `bfloat16`.
    - `batch_tokens`, `batch_size`: tokens and rows of a batch at most; a batch that does not fit in
      memory is halved anyway. `max_length`: tokens of a row, by default what the model was made for; longer
      rows are cut and counted, under `strict` refused.
    - `limit`: score only so many rows, the first or with `shuffle_seed` a random choice, and mark the result
      as partial. `seed`: of the bootstrap.
    - `states`: a folder in which the hidden states at the scored positions are kept, 4·H bytes each, for a
      comparison of the same models on the same test set, which then need not run them again.
    - `executor`: where batches are scored; this process by default. One of `executors.ray` gives the same
      bytes where hardware, versions and threads are the same. `{role}.chunks.jsonl` then tells of each batch
      what computed it, and a finding says where that differs.

    Finished batches are kept in a journal beside the output: killed at any point, the same call goes on after
    the last of them and gives the same bytes. `keep_journal` leaves it there in the end, for a caller who has
    more to do with the model: interrupted later, the same call takes everything from it. `forget_journal`
    removes it.

    Raises `DataError` for rows that cannot be scored, `CheckpointError` and `AdapterError` for a model that
    cannot be used, `UsageError` for options that do not fit, `MemoryLimitError` when one row does not fit,
    `BusyError` while another process writes the same result.
    """
    options = ScoringOptions.chosen(locals())
    adapter = None if adapter is None else Path(adapter)
    model = local_model(model, [] if adapter is None else [adapter], progress=progress)
    test_set, output = Path(test_set), Path(output)
    role = role or ("base" if adapter is None else "adapter")
    if role not in ROLES:
        raise UsageError(f"there is no role {role!r}", expected=" | ".join(ROLES))
    folders = [model] if adapter is None else [model, adapter]
    inputs = Inputs.of(folders, test_set)
    where, log = executor or Local(), ChunkLog()
    with ExitStack() as stack:
        stack.enter_context(where)
        own = None
        if states is None:
            own = stack.enter_context(open_journal(_journal(output, role), inputs, options))
        route = route_of(options, own)
        loaded = options.load(model, adapter=adapter, dtype=route.dtype)
        work = prepare(test_set, loaded, options, route)
        inputs.require_unchanged()
        identity = identify(role, model, adapter, loaded)
        journal = own
        if states is not None:
            kept = open_states(Path(states) / f"{role}.journal", folders, loaded, work, route)
            journal = stack.enter_context(kept)
        replica = Replica.of(work, model, adapter, test_set, options, route)
        recipe = Recipe(OPEN_SCORING, {"replica": replica, "keep": states is not None}, replica.gpu)
        logprobs = score(loaded, work, route, f"Validate {role}", journal, progress, where, recipe, log)
        work.findings.extend(log.findings())
        result, table = _result(identity, inputs, loaded, work, logprobs)
        log.write(output / f"{role}.chunks.jsonl", wanted=where.elsewhere)
        write_bytes(output / f"{role}.parquet", table)
        write_record(output / f"{role}.json", result)
        if own and not keep_journal:
            own.remove()
    return result


def forget_journal(output: Path, role: str) -> None:
    """Remove what `validate` left under `keep_journal`."""
    journal = _journal(output, role)
    with os_errors(journal, "remove"):
        journal.unlink(missing_ok=True)


def _journal(output: Path, role: str) -> Path:
    return output / f".{role}.journal"


def _result(
    identity: ModelIdentity,
    inputs: Inputs,
    loaded: LoadedModel,
    work: Workload,
    logprobs: list[Floats],
) -> tuple[ValidationResult, bytes]:
    """The record and the per-example Parquet file."""
    table = example_table(work.examples, work.rows, logprobs, loaded.tokenizer)
    overall, groups = aggregate(work.examples, logprobs, work.settings.seed)
    result = ValidationResult(
        model=identity,
        test_set=inputs.file,
        settings=work.settings,
        overall=overall,
        groups=groups,
        truncated=work.encoded.truncated,
        straddling=work.encoded.straddling,
        per_example=FileDigest(
            path=f"{identity.role}.parquet", bytes=len(table), sha256=hashlib.sha256(table).hexdigest()
        ),
        partial=work.partial,
        findings=work.findings,
    )
    return result, table


def score(
    loaded: LoadedModel,
    work: Workload,
    route: Route,
    label: str,
    journal: Journal | None,
    progress: Progress,
    executor: Executor,
    recipe: Recipe,
    log: ChunkLog,
) -> list[Floats]:
    """Log-probabilities of the scored tokens of every row, in the order of the test set.

    The journal gets the hidden states as well where the recipe says `keep`.
    """
    found: dict[int, Floats] = {}
    with (
        open_forward(loaded, work.rows, route) as forward,
        progress(label, total=work.tokens, unit="tok") as advance,
    ):
        scoring = scoring_work(forward, work, keep=recipe.arguments["keep"])
        for rows, (values, _) in executor.work_through(work.batches(), scoring, journal, recipe, log):
            found.update(zip(rows, values, strict=True))
            advance(sum(len(work.rows[row].ids) for row in rows))
    return [found[row] for row in range(len(work.rows))]
