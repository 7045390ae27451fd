"""Validation: loss and perplexity of one model on one test set, by group, with every token kept."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorasmith.data.sources import local_rows
from lorasmith.errors import UsageError, os_errors
from lorasmith.executors.base import ChunkLog, Executor, Local
from lorasmith.files.atomic import StrPath, write_bytes, write_record
from lorasmith.files.output_folder import require_own_record
from lorasmith.hub.models import local_model
from lorasmith.models.hidden_states import open_scoring, open_states
from lorasmith.models.scorer import Scorer
from lorasmith.models.scoring import Floats, row_loss
from lorasmith.models.session import Inputs, identify, open_journal, route_of
from lorasmith.models.statistics import Array, group_fields, group_rows, mean_interval, perplexity
from lorasmith.models.text import Encoded
from lorasmith.options import ScoringOptions, ValidateOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest
from lorasmith.records.dataset import Example
from lorasmith.records.scoring import GroupMetrics, ModelIdentity, OtherBoundary, ValidationResult
from lorasmith.scoring.boundaries import boundary_findings, other_boundary

# From log-probabilities of tokens to loss and perplexity of groups, and the table of rows.


WORST = 5
"""Tokens of each row that are listed with their text: those the model expected least."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("domain", pa.string()),
        ("difficulty", pa.string()),
        ("tokens", pa.int32()),
        ("loss", pa.float64()),
        ("perplexity", pa.float64()),
        ("truncated", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        (
            "worst",
            pa.list_(
                pa.struct(
                    [
                        ("position", pa.int32()),
                        ("token_id", pa.int32()),
                        ("text", pa.string()),
                        ("logprob", pa.float32()),
                    ]
                )
            ),
        ),
    ]
)
"""Columns of the per-example Parquet file; `position` counts scored tokens from 0."""


def group_metrics(losses: Array, tokens: Array, rows: Sequence[int] | None, seed: int) -> GroupMetrics:
    """Token-weighted loss of the given rows (None: all) from per-row loss sums and token counts."""
    if rows is not None:
        losses, tokens = losses[list(rows)], tokens[list(rows)]
    loss = float(losses.sum() / tokens.sum())
    return GroupMetrics(
        examples=len(losses),
        tokens=int(tokens.sum()),
        loss=loss,
        perplexity=perplexity(loss),
        interval=mean_interval(losses, tokens, seed),
    )


LAST_TURN = 8
"""Turns of the assistant that are groups of their own; later ones are one group together."""


def by_turn(rows: Sequence[Encoded], logprobs: Sequence[Floats], seed: int) -> dict[str, GroupMetrics]:
    """Metrics by which of the assistant's turns a token is in; empty where no row has several of them."""
    if not any(len(row.turns) > 1 for row in rows):
        return {}
    losses, tokens = (np.zeros((LAST_TURN + 1, len(rows))) for _ in range(2))
    for place, (row, values) in enumerate(zip(rows, logprobs, strict=True)):
        start = 0
        # A row of one question and one answer has no numbers: its answer is the first.
        for turn, (first, last) in zip(row.turns or (1,), row.spans, strict=True):
            own = values[start : start + last - first]
            losses[min(turn, LAST_TURN + 1) - 1, place] += row_loss(own)
            tokens[min(turn, LAST_TURN + 1) - 1, place] += len(own)
            start += last - first
    names = [*(str(turn) for turn in range(1, LAST_TURN + 1)), f"{LAST_TURN + 1} and later"]
    found = {}
    for name, loss, count in zip(names, losses, tokens, strict=True):
        there = np.flatnonzero(count)
        if len(there):
            found[name] = group_metrics(loss, count, there.tolist(), seed)
    return found


def aggregate(
    examples: Sequence[Example], rows: Sequence[Encoded], logprobs: Sequence[Floats], seed: int
) -> tuple[GroupMetrics, dict[str, dict[str, GroupMetrics]]]:
    """Metrics over all rows, by group and crossing of groups, and by turn of a conversation."""
    losses = np.array([row_loss(row) for row in logprobs])
    tokens = np.array([len(row) for row in logprobs], dtype=np.float64)
    overall = group_metrics(losses, tokens, None, seed)
    grouped = group_rows([group_fields(example) for example in examples])
    groups = {
        dimension: {name: group_metrics(losses, tokens, rows, seed) for name, rows in members.items()}
        for dimension, members in grouped.items()
    }
    turns = by_turn(rows, logprobs, seed)
    return overall, groups | ({"turn": turns} if turns else {})


def example_table(
    examples: Sequence[Example], encoded: Sequence[Encoded], logprobs: Sequence[Floats], tokenizer: Any
) -> bytes:
    """The per-example Parquet file: the same rows give the same bytes."""
    rows = []
    for example, tokens, values in zip(examples, encoded, logprobs, strict=True):
        ids = tokens.targets
        loss = row_loss(values) / len(values)
        worst = np.argsort(values, kind="stable")[:WORST]
        rows.append(
            {
                "id": example.id,
                **group_fields(example),
                "tokens": len(ids),
                "loss": loss,
                "perplexity": perplexity(loss),
                "truncated": tokens.truncated,
                "token_ids": ids,
                "logprobs": values,
                "worst": [
                    {
                        "position": int(place),
                        "token_id": ids[place],
                        "text": tokenizer.decode([ids[place]]),
                        "logprob": values[place],
                    }
                    for place in worst
                ],
            }
        )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()


ROLES = ("base", "adapter", "merged")


@documented(ValidateOptions)
def validate(
    model: StrPath,
    test_set: StrPath,
    output: StrPath,
    *,
    adapter: StrPath | None = None,
    role: str | None = None,
    options: ValidateOptions | None = None,
    keep_journal: bool = False,
    both_boundaries: bool = True,
    executor: Executor | None = None,
    progress: Progress = silent,
    **given: Any,
) -> ValidationResult:
    """Score the model in `model`, with `adapter` on it unless None, on every response of `test_set`.

    Writes `{role}.json` and `{role}.parquet` into `output`; `role` is `base`, `adapter` or `merged`, by
    default the one of the first two that `adapter` says.

    Rows of more than `max_length` tokens, by default what the model was made for, are refused; with
    `strict=False` they are cut and counted. A batch that does not fit in memory is halved. With `states` the
    hidden states at the scored positions are kept, 4·H bytes each, for a comparison of the same models on
    the same test set, which then need not run them again.

    With `both_boundaries` some rows are scored with the other boundary between prompt and answer as well, so
    that the result can say what a trainer would have printed.

    `executor` is where batches are scored; this process by default. One of `executors.ray` gives the same
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
    asked = ValidateOptions.given(options, given)
    scoring, states = ScoringOptions.taken_from(asked), asked.states
    adapter = None if adapter is None else Path(adapter)
    model = local_model(model, [] if adapter is None else [adapter], progress=progress)
    test_set, output = local_rows(test_set, asked), Path(output)
    role = role or ("base" if adapter is None else "adapter")
    if role not in ROLES:
        raise UsageError(f"there is no role {role!r}", expected=" | ".join(ROLES))
    require_own_record(output / f"{role}.json")
    folders = [model] if adapter is None else [model, adapter]
    inputs = Inputs.of(folders, test_set)
    where, log = executor or Local(), ChunkLog()
    with ExitStack() as stack:
        stack.enter_context(where)
        own = None
        if states is None:
            own = stack.enter_context(open_journal(_journal(output, role), inputs, scoring))
        route = route_of(scoring, own)
        scorer = Scorer.load(
            model, test_set, scoring, route, adapter=adapter, executor=where, log=log, progress=progress
        )
        work = scorer.work
        inputs.require_unchanged()
        identity = identify(role, model, adapter, scorer.loaded)
        journal = own
        if states is not None:
            journal = stack.enter_context(open_states(states / f"{role}.journal", folders, scorer))
        # Longest batches come first, so rows arrive in another order than the test set's.
        by_row = replace(scorer, journal=journal).run(
            open_scoring, work.batches(), f"Validate {role}", unit="tok", keep=states is not None
        )
        logprobs = [by_row[row] for row in range(len(work.rows))]
        other = other_boundary(scorer, scoring, logprobs) if both_boundaries else None
        work.findings.extend([*boundary_findings(other, scoring.boundary), *log.findings()])
        result, table = _result(identity, inputs, scorer, logprobs, other)
        log.write(output / f"{role}.chunks.jsonl", wanted=where.remote)
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
    scorer: Scorer,
    logprobs: list[Floats],
    other: OtherBoundary | None,
) -> tuple[ValidationResult, bytes]:
    """The record and the per-example Parquet file."""
    work = scorer.work
    table = example_table(work.examples, work.rows, logprobs, scorer.loaded.tokenizer)
    overall, groups = aggregate(work.examples, work.rows, logprobs, work.settings.seed)
    result = ValidationResult(
        model=identity,
        test_set=inputs.file,
        settings=work.settings,
        overall=overall,
        groups=groups,
        truncated=work.encoded.truncated,
        straddling=work.encoded.straddling,
        other_boundary=other,
        per_example=FileDigest(
            path=f"{identity.role}.parquet", bytes=len(table), sha256=hashlib.sha256(table).hexdigest()
        ),
        partial=work.partial,
        findings=work.findings,
    )
    return result, table
