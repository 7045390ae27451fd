"""The benchmarks' own metrics: choices by likelihood, written answers by each benchmark's own judge."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorasmith.benchmarks.base import Judge, Unscored
from lorasmith.benchmarks.choices import LETTERS
from lorasmith.benchmarks.registry import BY_NAME
from lorasmith.benchmarks.sandbox.run import anyway, unkept
from lorasmith.data.rows import read_examples
from lorasmith.data.sources import local_rows
from lorasmith.errors import DataError, LorasmithError
from lorasmith.executors.base import ChunkLog, Executor, Local
from lorasmith.files.atomic import StrPath, write_bytes, write_record
from lorasmith.files.output_folder import require_own_record
from lorasmith.hub.models import local_model
from lorasmith.models.generation.generate import Generated
from lorasmith.models.scorer import Scorer
from lorasmith.models.session import (
    Inputs,
    Workload,
    identify,
    open_journal,
    route_of,
    take_rows,
)
from lorasmith.models.statistics import mean_interval
from lorasmith.options import AnswerOptions, ScoringOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.dataset import Example
from lorasmith.records.scoring import TaskMetric, TaskResult
from lorasmith.scoring.answers import (
    Rules,
    cut,
    ending_likelihoods,
    generated_answers,
    letter_likelihoods,
)
from lorasmith.scoring.own_metric import OwnMetric, judge_of

# From answers to verdicts: each benchmark's own judge, its metrics with intervals, the table of rows.


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("benchmark", pa.string()),
        ("method", pa.string()),
        ("answer", pa.string()),
        ("finished", pa.bool_()),
        ("metrics", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
        ("weights", pa.list_(pa.float64())),
        ("unscored", pa.string()),
    ]
)
"""Columns of `{role}_tasks.parquet`; `scores` and their `weights` belong to `metrics`, `unscored` says why
there are none."""


@dataclass(frozen=True)
class Judged:
    """One example with its answer and verdict."""

    example: Example
    judge: Judge
    method: str
    answer: str
    finished: bool
    scores: dict[str, float]
    unscored: str = ""

    def weight(self, metric: str) -> float:
        """How much the row counts in the mean of a metric."""
        return self.judge.weight(self.example, metric)


_JUDGE_FAILED = "the judge failed"


def judge_choice(example: Example, judge: Judge, likelihoods: Sequence[float]) -> Judged:
    """The likeliest choice against the right one; its letter stands for the answer."""
    best = LETTERS[int(np.argmax(likelihoods))]
    scores = judge.judge_likelihoods(example, likelihoods)
    return Judged(example, judge, "likelihood", best, True, scores)


def judge_text(scorer: Scorer, row: int, judge: Judge, written: Generated) -> Judged:
    """What its benchmark's judge says of a written answer; without a verdict it is unscored, not wrong."""
    example, finished = scorer.work.examples[row], written.finished
    answer = scorer.loaded.tokenizer.decode(written.tokens, skip_special_tokens=True)
    if scorer.work.settings.template == "plain":
        answer = cut(answer, judge.stop_texts)
    try:
        scores = judge.score(example, answer)
    except Unscored as error:
        return Judged(example, judge, "generation", answer, finished, {}, str(error))
    except LorasmithError:
        raise  # what the machine cannot do stops the command, whatever the answer is
    except Exception as error:
        # A model may write what no judge was made for; the answers of the other rows count all the same.
        reason = f"{_JUDGE_FAILED}: {type(error).__name__}"
        return Judged(example, judge, "generation", answer, finished, {}, reason)
    return Judged(example, judge, "generation", answer, finished, scores)


def task_metrics(judged: Sequence[Judged], seed: int, max_new_tokens: int | None = None) -> list[TaskMetric]:
    """Each benchmark's metrics over its rows, with an interval by bootstrap."""
    metrics = []
    for name in sorted({one.judge.name for one in judged}):
        own = [one for one in judged if one.judge.name == name]
        reasons = Counter(one.unscored for one in own if one.unscored)
        longest = max_new_tokens or own[0].judge.max_new_tokens
        limit = longest if own[0].method == "generation" else None
        for metric in dict.fromkeys(metric for one in own for metric in one.scores) or ["unscored"]:
            scored = sum(metric in one.scores for one in own)
            # The rate is over all rows: an answer that nobody could judge is not one more that was right.
            scores = np.array([one.scores.get(metric, 0.0) for one in own])
            weights = np.array([one.weight(metric) for one in own])
            metrics.append(
                TaskMetric(
                    benchmark=name,
                    metric=metric,
                    method=own[0].method,
                    examples=len(own),
                    scored=scored,
                    unscored=len(own) - scored,
                    reasons=dict(sorted(reasons.items())),
                    hit_limit=sum(not one.finished for one in own),
                    max_new_tokens=limit,
                    value=float((scores * weights).sum() / weights.sum()) if scored else None,
                    interval=mean_interval(scores * weights, weights, seed) if scored else None,
                )
            )
    return metrics


def judged_table(judged: Sequence[Judged]) -> bytes:
    """The Parquet file of the answers: the same rows give the same bytes."""
    rows: list[dict[str, Any]] = [
        {
            "id": one.example.id,
            "benchmark": one.judge.name,
            "method": one.method,
            "answer": one.answer,
            "finished": one.finished,
            "metrics": list(one.scores),
            "scores": list(one.scores.values()),
            "weights": [one.weight(metric) for metric in one.scores],
            "unscored": one.unscored,
        }
        for one in judged
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()


@documented(AnswerOptions)
def evaluate_tasks(
    model: StrPath,
    test_set: StrPath,
    output: StrPath,
    *,
    adapter: StrPath | None = None,
    role: str | None = None,
    options: AnswerOptions | None = None,
    run_code_anyway: bool = False,
    task_module: StrPath | None = None,
    max_new_tokens: int | None = None,
    executor: Executor | None = None,
    progress: Progress = silent,
    **given: Any,
) -> TaskResult:
    """Answer the test set's benchmark examples and score the answers as each benchmark does.

    Questions with choices (GPQA, MMLU) are answered by the likeliest letter, endings (HellaSwag) by the
    likeliest whole text, the others (DROP, MATH, HumanEval) by greedy generation; rows of no known benchmark
    are left out and counted in a finding.
    `task_module` is a file with a metric of the caller's own (`scoring.own_metric`), which is run as it is.
    `max_new_tokens` is the longest written answer, by default what each benchmark's own answers need.
    Code runs in a sandbox; where that lacks something, only with `run_code_anyway`, which a finding tells.
    Writes `{role}_tasks.json` and `{role}_tasks.parquet`; resumable like `validate`.
    Raises `DataError` when no row belongs to a benchmark.
    """
    asked = AnswerOptions.given(options, given)
    scoring = ScoringOptions.taken_from(asked, end_of_turn=False)
    test_set, output = local_rows(test_set, asked), Path(output)
    adapter = None if adapter is None else Path(adapter)
    model = local_model(model, [] if adapter is None else [adapter], progress=progress)
    role = role or ("base" if adapter is None else "adapter")
    require_own_record(output / f"{role}_tasks.json")
    own_metric = None if task_module is None else OwnMetric(Path(task_module))
    prompts = _own_prompts(test_set, scoring, own_metric)
    inputs = Inputs.of([model] if adapter is None else [model, adapter], test_set)
    where, log = executor or Local(), ChunkLog()
    with ExitStack() as stack:
        stack.enter_context(where)
        stack.enter_context(anyway(run_code_anyway))
        journals = [
            stack.enter_context(open_journal(output / f".{role}_{kind}.journal", inputs, scoring, **also))
            for kind, also in (
                ("choices", {}),
                ("endings", {}),
                ("answers", _asked_by(own_metric, prompts, max_new_tokens)),
            )
        ]
        route = route_of(scoring, journals[0])
        scorer = Scorer.load(
            model,
            test_set,
            scoring,
            route,
            adapter=adapter,
            questions=True,
            executor=where,
            log=log,
            progress=progress,
        )
        work = scorer.work
        inputs.require_unchanged()
        identity = identify(role, model, adapter, scorer.loaded)
        own = require_questions(work.examples, test_set, own_metric)
        letters, endings, written = (
            [row for row in own if own[row].answered_by == kind] for kind in ("letter", "ending", "text")
        )
        likelihoods = letter_likelihoods(scorer.part("choices", journals[0]), letters)
        likelihoods |= ending_likelihoods(scorer.part("endings", journals[1]), endings)
        rules = {work.examples[row].metadata.source: Rules.of(own[row], max_new_tokens) for row in written}
        answers = generated_answers(scorer.part("answers", journals[2]), written, rules, prompts)
        work.findings.extend(log.findings())
        judged = [judge_choice(work.examples[row], own[row], likelihoods[row]) for row in letters + endings]
        with progress("Judge answers", total=len(written), unit="row") as advance:
            for row in written:
                judged.append(judge_text(scorer, row, own[row], answers[row]))
                advance(1)
        table = judged_table(judged)
        result = TaskResult(
            model=identity,
            test_set=inputs.file,
            settings=work.settings,
            metrics=task_metrics(judged, scoring.seed, max_new_tokens),
            task_module=own_metric.file if own_metric else None,
            per_example=FileDigest(
                path=f"{role}_tasks.parquet", bytes=len(table), sha256=hashlib.sha256(table).hexdigest()
            ),
            partial=work.partial,
            findings=[
                *work.findings,
                *_unprotected(own.values()),
                *_left_out(work, len(own)),
                *_judge_failures(judged, role),
                *_own_code(own_metric, own.values()),
            ],
        )
        log.write(output / f"{role}_tasks.chunks.jsonl", wanted=where.remote)
        write_bytes(output / f"{role}_tasks.parquet", table)
        write_record(output / f"{role}_tasks.json", result)
        for journal in journals:
            if journal:
                journal.remove()
    return result


def answerable(example: Example) -> bool:
    """Whether it is a question of a benchmark that `evaluate_tasks` knows how to put."""
    return judge_of(example, None) is not None


def foresee_questions(test_set: StrPath, options: AnswerOptions, task_module: StrPath | None = None) -> None:
    """Raise `DataError` where `evaluate_tasks` would find no row to ask; needs no model.

    A task module that fails on the first of its rows is a `UsageError` here already.
    """
    own_metric = None if task_module is None else OwnMetric(Path(task_module))
    rows = local_rows(test_set, options)
    require_questions(take_rows(read_examples(rows), options), rows, own_metric)


def require_questions(
    examples: Sequence[Example], test_set: Path, own_metric: OwnMetric | None = None
) -> dict[int, Judge]:
    """Each row that can be answered, with its judge; `DataError` for none, and where one cannot be judged."""
    judges = {
        row: judge
        for row, example in enumerate(examples)
        if (judge := judge_of(example, own_metric)) is not None
    }
    if own_metric is not None:
        first = next((row for row, judge in judges.items() if judge is own_metric), None)
        if first is None:
            raise DataError(
                f"no row is one that {own_metric.path.name} judges",
                where=test_set,
                expected=f"metadata.source among {', '.join(own_metric.sources)}"
                if own_metric.sources
                else "rows of no known benchmark, or SOURCES in the task module",
            )
        own_metric.try_on(examples[first])
    if not judges:
        raise DataError(
            "no row belongs to a benchmark that can be answered",
            where=test_set,
            expected=f"metadata.source among {', '.join(BY_NAME)}",
            remedy="build the test set with `lorasmith testset build`, validate without tasks, or give a "
            "metric of your own (--task-module)",
        )
    for row, judge in judges.items():  # before hours of answers, not at the first verdict
        if fault := judge.fault(examples[row]):
            raise DataError(
                f"the row {examples[row].id!r} cannot be judged as one of {judge.name}: {fault}",
                where=test_set,
                expected=f"in its metadata: {', '.join(judge.needs)}",
                remedy="build the test set with `lorasmith testset build`, or give the row another source",
            )
    return judges


def _own_prompts(test_set: Path, options: AnswerOptions, own_metric: OwnMetric | None) -> dict[int, str]:
    """Row → the text that the caller's own file puts in place of the row's prompt."""
    if own_metric is None:
        return {}
    rows = enumerate(take_rows(read_examples(test_set), options))
    made = {row: own_metric.prompt(example) for row, example in rows if own_metric.takes(example)}
    return {row: prompt for row, prompt in made.items() if prompt is not None}


def _asked_by(
    own_metric: OwnMetric | None, prompts: dict[int, str], max_new_tokens: int | None
) -> dict[str, Any]:
    """What decides the answers beside the rows: a mended `score` of an own file costs none of them."""
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    if own_metric is None:
        return limit
    rules = [own_metric.sources, own_metric.max_new_tokens, own_metric.stop_texts]
    return {"own_metric": [*rules, sorted(prompts.items())], **limit}


def _own_code(own_metric: OwnMetric | None, judges: Iterable[Judge]) -> list[Finding]:
    if own_metric is None:
        return []
    rows = sum(judge is own_metric for judge in judges)
    message = (
        f"{rows} rows were judged as {own_metric.name} by the caller's own {own_metric.file.path} "
        f"(SHA-256 {own_metric.file.sha256[:16]}…)"
    )
    return [Finding(severity="note", code="own-metric", message=message)]


def _unprotected(judges: Iterable[Judge]) -> list[Finding]:
    runs_code = any(judge.runs_code for judge in judges)
    if not runs_code or not (broken := unkept()):
        return []
    finding = Finding(
        severity="warning",
        code="code-ran-unprotected",
        message=f"generated code ran although this machine cannot keep the promise of {', '.join(broken)}",
        expected="every promise of the sandbox kept",
        remedy="leave --run-code-anyway out: such answers are unscored then",
    )
    return [finding]


def _left_out(work: Workload, known: int) -> list[Finding]:
    left_out = len(work.examples) - known
    if not left_out:
        return []
    message = f"{left_out} of {len(work.examples)} rows belong to no benchmark that can be answered"
    return [Finding(severity="note", code="no-task", message=message)]


def _judge_failures(judged: Sequence[Judged], role: str) -> list[Finding]:
    failed = [one for one in judged if one.unscored.startswith(_JUDGE_FAILED)]
    if not failed:
        return []
    finding = Finding(
        severity="warning",
        code="judge-failed",
        message=f"the judge failed over {len(failed)} of {len(judged)} answers, which are unscored; the "
        f"first is that to {failed[0].example.id!r} ({failed[0].unscored})",
        remedy=f"report it with the answer, which stands in {role}_tasks.parquet",
    )
    return [finding]
