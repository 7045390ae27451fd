"""Validation: loss and perplexity of one model on one test set, by group, with every token kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lorasmith.errors import UsageError
from lorasmith.executors.local import work_through
from lorasmith.files.atomic import write_bytes, write_record
from lorasmith.models.arithmetic import Route
from lorasmith.models.batches import halve, make_batch
from lorasmith.models.load import LoadedModel, load_model
from lorasmith.models.loglik import Floats, open_forward, score_batch
from lorasmith.models.memory import is_out_of_memory, release_memory
from lorasmith.models.session import ScoringOptions, Workload, describe_test_set, identify, prepare
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest
from lorasmith.records.scoring import ValidationResult
from lorasmith.scoring.aggregate import aggregate, example_table

ROLES = ("base", "adapter", "merged")


def validate(
    model: Path,
    test_set: Path,
    output: Path,
    *,
    adapter: Path | None = None,
    role: str | None = None,
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
    progress: Progress = silent,
) -> ValidationResult:
    """Score the model in `model`, with `adapter` on it unless None, on every response of `test_set`.

    Writes `{role}.json` and `{role}.parquet` into `output`; `role` is `base`, `adapter` or `merged`, by
    default the one of the first two that `adapter` says.

    - `template`: `chat`, `plain`, or `auto` for chat where the tokenizer has a template.
    - `loss_on`: `response`, or `all` for the loss over prompt and response.
    - `end_of_turn`: whether the token that ends the response is scored as well.
    - `device`: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; `arithmetic`: `auto` (float32 by the faster route),
      `mkl`, `onednn` or `bfloat16`.
    - `batch_tokens`: padded tokens of a batch. `max_length`: tokens of a row, by default what the model was
      made for; longer rows are cut and counted, under `strict` refused.
    - `limit`: score only the first rows, and mark the result as partial. `seed`: of the bootstrap.

    Raises `DataError` for rows that cannot be scored, `CheckpointError` and `AdapterError` for a model that
    cannot be used, `UsageError` for options that do not fit, `MemoryLimitError` when one row does not fit.
    """
    role = role or ("base" if adapter is None else "adapter")
    if role not in ROLES:
        raise UsageError(f"there is no role {role!r}", expected=" | ".join(ROLES))
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
    loaded = load_model(model, adapter=adapter, device=place, dtype=route.dtype)
    work = prepare(test_set, loaded, options, route)
    logprobs = score(loaded, work, route, f"Validate {role}", progress)
    table = example_table(work.examples, work.rows, logprobs, loaded.tokenizer)
    overall, groups = aggregate(work.examples, logprobs, seed)
    result = ValidationResult(
        model=identify(role, model, adapter, loaded),
        test_set=digest,
        settings=work.settings,
        overall=overall,
        groups=groups,
        truncated=work.encoded.truncated,
        straddling=work.encoded.straddling,
        per_example=FileDigest(
            path=f"{role}.parquet", bytes=len(table), sha256=hashlib.sha256(table).hexdigest()
        ),
        partial=work.partial,
        findings=work.findings,
    )
    write_bytes(output / f"{role}.parquet", table)
    write_record(output / f"{role}.json", result)
    return result


def score(
    loaded: LoadedModel, work: Workload, route: Route, label: str, progress: Progress = silent
) -> list[Floats]:
    """Log-probabilities of the scored tokens of every row, in the order of the test set."""
    found: dict[int, Floats] = {}
    with (
        open_forward(loaded, work.rows, route) as forward,
        progress(label, total=work.tokens, unit="tok") as advance,
    ):
        for rows, values in work_through(
            work.batches(),
            lambda rows: score_batch(forward, make_batch(rows, work.rows), work.names),
            split=halve,
            out_of_memory=is_out_of_memory,
            release=release_memory,
        ):
            found.update(zip(rows, values, strict=True))
            advance(sum(len(work.rows[row].ids) for row in rows))
    return [found[row] for row in range(len(work.rows))]
