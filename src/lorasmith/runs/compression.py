"""Compress a model in one way or in several, each measured against the original as a merge is."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lorasmith
from lorasmith.checkpoint.model import open_checkpoint
from lorasmith.data.rows import read_examples
from lorasmith.errors import os_errors
from lorasmith.files.atomic import StrPath, read_record, write_record
from lorasmith.files.digests import digest_folder, sha256_file
from lorasmith.followup.compression.compress import compress as quantize
from lorasmith.followup.compression.compress import prepare_compression
from lorasmith.followup.compression.settings import every_way, only_way
from lorasmith.followup.compression.table import recommend
from lorasmith.gates.metrics import MAIN_METRICS
from lorasmith.models.device import resolve_device
from lorasmith.options import AnswerOptions, CompressOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.proving.behaviour.compare import compare_pair
from lorasmith.records.compression import CompressionsRecord, CompressRecord, TaskQuality
from lorasmith.records.scoring import TaskResult
from lorasmith.scoring.paired import paired_quality
from lorasmith.scoring.tasks import answerable, evaluate_tasks

RECORD = "compressions.json"


@documented(CompressOptions)
def compress(
    model: StrPath,
    output: StrPath,
    *,
    options: CompressOptions | None = None,
    work: StrPath | None = None,
    progress: Progress = silent,
    **given: Any,
) -> CompressRecord:
    """Quantize the model in a folder, write it to `output`, measure what it lost on the test set, if any.

    Token by token in float32 and, unless `tasks` is off, on the benchmarks' questions. The options name one
    format and method; `compress_several` takes more. A finished output of the same inputs and options is
    kept; a killed measuring goes on, in `work` where that is given. What is raised stands at
    `followup.compression.compress`.
    """
    chosen = CompressOptions.given(options, given)
    return quantize(
        model,
        output,
        options=chosen,
        work=work,
        compare=compare_pair,
        ask=partial(ask_pair, run_code_anyway=chosen.run_code_anyway) if chosen.tasks else None,
        progress=progress,
    )


@documented(CompressOptions)
def compress_several(
    model: StrPath,
    output: StrPath,
    *,
    options: CompressOptions | None = None,
    progress: Progress = silent,
    **given: Any,
) -> CompressionsRecord:
    """Compress a model in every way that the options name, each to a folder of its own below `output`.

    Writes `compressions.json` beside the folders, which says which to take. The original is run and asked
    once for all. Raises what `compress` does, for any of the ways before the first is begun.
    """
    place, chosen = Path(output), CompressOptions.given(options, given)
    ways, source = every_way(chosen, chosen.seed), open_checkpoint(Path(model))
    for way in ways:
        prepare_compression(source, way, chosen)
    with os_errors(place, "write"):
        place.mkdir(parents=True, exist_ok=True)
    work = place / ".measuring"
    records = [
        compress(model, place / way.name, options=only_way(chosen, way), work=work, progress=progress)
        for way in ways
    ]
    names = [way.name for way in ways]
    recommended, reason = recommend(names, records)
    record = CompressionsRecord(folders=names, compressed=records, recommended=recommended, reason=reason)
    write_record(place / RECORD, record)
    shutil.rmtree(work, ignore_errors=True)
    return record


def ask_pair(
    model: Path,
    compressed: Path,
    test_set: Path,
    *,
    work: Path,
    device: str,
    limit: int | None,
    run_code_anyway: bool = False,
    progress: Progress,
) -> TaskQuality | None:
    """The benchmarks' questions to an original and to what was made of it.

    Answers stay in `work`, so that the original is asked once for all that is made of it. None where the rows
    hold no question, or none has a verdict for both models.
    """
    examples = read_examples(test_set)[:limit]
    if not any(answerable(example) for example in examples):
        return None
    answers = work / f"tasks-{lorasmith.__version__}{'-code' if run_code_anyway else ''}"
    tables = []
    for role, folder in (("original", model), ("compressed", compressed)):
        if not _answered(answers, role, folder, test_set, device, limit):
            evaluate_tasks(
                folder,
                test_set,
                answers,
                role=role,
                options=AnswerOptions(device=device, limit=limit, strict=False),
                run_code_anyway=run_code_anyway,
                progress=progress,
            )
        tables.append(answers / f"{role}_tasks.parquet")
    return paired_quality(tables[0], tables[1], examples, MAIN_METRICS)


def _answered(answers: Path, role: str, model: Path, test_set: Path, device: str, limit: int | None) -> bool:
    """Whether these very questions were put to this very model before."""
    place = answers / f"{role}_tasks.json"
    if not place.is_file():
        return False
    earlier = read_record(place, TaskResult)
    table = answers / earlier.per_example.path
    return (
        earlier.model.model_sha256 == digest_folder(model)
        and earlier.test_set.sha256 == sha256_file(test_set)
        and (earlier.settings.limit, earlier.settings.device) == (limit, resolve_device(device).type)
        and table.is_file()
        and sha256_file(table) == earlier.per_example.sha256
    )
