"""Does the merged model behave as the adapter does? The same tokens, float32 on the stored weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lorasmith.errors import UsageError
from lorasmith.executors.base import Executor, Local
from lorasmith.executors.log import ChunkLog
from lorasmith.files.atomic import write_record
from lorasmith.files.hub import local_model
from lorasmith.files.paths import StrPath
from lorasmith.models.inputs import Inputs
from lorasmith.models.session import ScoringOptions, open_journal, route_of
from lorasmith.progress import Progress, silent
from lorasmith.proving.behaviour_generation import open_text_journals
from lorasmith.proving.behaviour_grade import grade, resolve_thresholds
from lorasmith.proving.behaviour_measure import compare_sides
from lorasmith.proving.behaviour_models import Comparison, generation_of, run_adapter, run_merged
from lorasmith.proving.behaviour_statistics import by_group, flips, per_example, summarise
from lorasmith.records.proof import BehaviourProof


def compare(
    base: StrPath,
    adapter: StrPath,
    merged: StrPath,
    test_set: StrPath,
    output: StrPath | None = None,
    *,
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
    thresholds: Mapping[str, float] | None = None,
    generate: int | None = None,
    states: StrPath | None = None,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> BehaviourProof:
    """Compare the adapter on its base (PEFT's forward, model A) with the merged model (B), token by token.

    The models are held in memory one after the other, in float32; their hidden states at the scored
    positions, 4·H bytes for each, lie on disk meanwhile. `states` is the folder where `validate` has kept
    some, which are then not computed again; what is missing is added. `output` is the file for the record, if
    any; `thresholds` replaces some of `behaviour_grade.THRESHOLDS`; the rest are options of validation.

    The floor is the adapter against itself, every matrix product adding its terms in another order, which
    needs no second route of the processor. Where a model is stored in 16 bits, the adapter computed in that
    type stands beside it, as it would be served. `generate` also has both models write so
    many tokens at most after each prompt, greedily, and compares them.

    `executor` is where both models run over the rows and write their texts; the floors and the comparison of
    the states, a small part of the work, are computed here. Then `NAME.chunks.jsonl` beside the record tells
    of each batch what computed it, and a finding says where that differs.

    Raises `CheckpointError` for models of different vocabulary.
    """
    options = ScoringOptions.chosen(locals())
    if arithmetic == "bfloat16":
        raise UsageError(
            "bfloat16 arithmetic cannot tell the two models apart", expected="auto, mkl or onednn"
        )
    if generate is not None and generate < 1:
        raise UsageError(f"{generate} tokens leave nothing to compare", expected="1 or more")
    adapter, merged = Path(adapter), Path(merged)
    base = local_model(base, [adapter], progress=progress)
    output = None if output is None else Path(output)
    limits = resolve_thresholds(thresholds)
    inputs = Inputs.of([base, adapter, merged], Path(test_set))
    path = None if output is None else output.with_name(f".{output.name}.journal")
    where, log = executor or Local(), ChunkLog()
    with (
        where,
        open_journal(path, inputs, options) as journal,
        open_text_journals(output, inputs, options, generate) as text_journals,
        _states_folder(None if states is None else Path(states), output) as folder,
    ):
        route = route_of(options, journal)
        asked = Comparison(inputs, options, generate, progress, route, folder, text_journals, where, log)
        with ExitStack() as stack:
            a = run_adapter(asked, stack)
            b = run_merged(asked, a.work, stack)
            rows = compare_sides(a.work, a.side, b.side, route, journal, progress)
        work, overall = a.work, summarise(rows, seed)
        floor = summarise(a.floor.rows, seed)
        verdict, reasons = grade(overall, floor, limits, a.obstacles)
        proof = BehaviourProof(
            grade=verdict,
            reasons=reasons,
            thresholds=limits,
            a=a.identity,
            b=b.identity,
            test_set=inputs.file,
            settings=work.settings,
            overall=overall,
            groups=by_group(work.examples, rows, seed),
            floor=floor,
            floor_layouts=a.floor.layouts,
            serving=summarise(a.serving.rows, seed) if a.serving else None,
            serving_layouts=a.serving.layouts if a.serving else [],
            flips=flips(work.examples, rows),
            examples=per_example(work.examples, rows),
            generation=generation_of(asked, a, b),
            partial=work.partial,
            findings=[*work.findings, *a.findings, *log.findings()],
        )
        if output is not None:
            chunks = output.with_name(output.name.removesuffix(".json") + ".chunks.jsonl")
            log.write(chunks, wanted=where.elsewhere)
            write_record(output, proof)
        for kept in (journal, *text_journals.values()):
            if kept:
                kept.remove()
    return proof


@contextmanager
def _states_folder(given: Path | None, output: Path | None) -> Iterator[Path]:
    """Where hidden states lie: the caller's folder, or one of our own that is gone when all went well."""
    if given is not None:
        yield given
    elif output is None:
        with tempfile.TemporaryDirectory(prefix="lorasmith-") as folder:
            yield Path(folder)
    else:
        own = output.with_name(f".{output.name}.states")
        yield own
        shutil.rmtree(own, ignore_errors=True)
