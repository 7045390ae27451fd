"""Does the merged model behave as the adapter does? The same tokens, float32 on the stored weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorasmith.checkpoint.header import read_object
from lorasmith.checkpoint.model import text_config
from lorasmith.data.sources import local_rows
from lorasmith.errors import CheckpointError
from lorasmith.executors.base import ChunkLog, Executor, Local
from lorasmith.files.atomic import StrPath, write_record
from lorasmith.files.output_folder import require_own_record
from lorasmith.hub.models import local_model
from lorasmith.models.conversation import Wording
from lorasmith.models.device import Route, release_memory
from lorasmith.models.hidden_states import open_states
from lorasmith.models.load import has_tokenizer, load_tokenizer, require_file
from lorasmith.models.scorer import Scorer
from lorasmith.models.session import (
    Inputs,
    Workload,
    identify,
    load_for,
    open_journal,
    route_of,
)
from lorasmith.models.text import encode_examples, resolve_template
from lorasmith.options import CompareOptions, ScoringOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.proving.behaviour.measure import (
    Floor,
    Side,
    by_group,
    compare_sides,
    flips,
    grade,
    is_finite,
    noise_floor,
    per_example,
    resolve_thresholds,
    run_side,
    serving_floor,
    summarise,
)
from lorasmith.proving.behaviour.texts import (
    TextJournals,
    Texts,
    compare_texts,
    open_text_journals,
    write_texts,
)
from lorasmith.records.base import FileDigest, Finding
from lorasmith.records.proof import BehaviourProof, GenerationComparison, TokenComparison
from lorasmith.records.scoring import ModelIdentity

# Do two models fit together: one vocabulary, and the same tokens from either folder?


def model_config(folder: Path) -> dict[str, Any]:
    """Its config.json; raises `CheckpointError` where there is none."""
    require_file(folder, "config.json", CheckpointError)
    return read_object(folder / "config.json", CheckpointError)


def announced_vocabulary(folder: Path) -> int | None:
    """As its config says it: known before the model is loaded."""
    announced = text_config(model_config(folder)).get("vocab_size")
    return announced if isinstance(announced, int) else None


def check_vocabulary(ours: int, merged: int | None, folder: Path) -> None:
    """Raise `CheckpointError` where the merged model has another number of embedding rows."""
    if merged is not None and ours != merged:
        raise CheckpointError(
            f"the merged model has {merged:,} embedding rows, base and adapter {ours:,}",
            where=folder,
            expected="two models of one vocabulary",
            remedy="merge this adapter into this base again",
        )


def compare_tokenizers(work: Workload, folder: Path) -> tuple[list[str], list[Finding]]:
    """Would the merged folder put the same tokens to its model? Obstacles to a grade, and findings."""
    if not has_tokenizer(folder):
        finding = Finding(
            severity="warning",
            code="no-tokenizer",
            message="the merged folder has no tokenizer; the adapter's was used for both models",
            where=folder.name,
            remedy="copy the tokenizer files into it, or merge again",
        )
        return [], [finding]
    tokenizer, template = load_tokenizer(folder), work.settings.template
    if resolve_template(tokenizer, "auto") == "plain" and template == "chat":
        different = len(work.rows)
    else:
        own = encode_examples(
            work.examples,
            tokenizer,
            template=template,
            end_of_turn=work.settings.end_of_turn,
            max_length=work.settings.max_length,
            loss_on=work.settings.loss_on,
            boundary=work.settings.boundary,
            wording=Wording(work.settings.system, work.settings.template_args),
        )
        different = sum(one.ids != two.ids for one, two in zip(work.rows, own.rows, strict=True))
    if not different:
        return [], []
    message = f"the merged folder's own tokenizer or chat template gives other tokens on {different} rows"
    finding = Finding(
        severity="error",
        code="tokenizer-differs",
        message=message,
        where=folder.name,
        expected="the tokenizer and the chat template that the adapter is used with",
        remedy="copy the tokenizer files and the chat template of the adapter into it, or merge again",
    )
    return [message], [finding]


# The two models of a comparison, loaded one after the other, and what each leaves behind.


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, and how."""

    inputs: Inputs
    """Base, adapter and merged model, and the test set."""
    options: ScoringOptions
    generate: int | None
    progress: Progress
    route: Route
    states: Path
    """Folder of the hidden states."""
    texts: TextJournals
    executor: Executor
    log: ChunkLog

    @property
    def running(self) -> dict[str, Any]:
        """How both models are run, as `Scorer.load` takes it."""
        return {"executor": self.executor, "log": self.log, "progress": self.progress}

    @property
    def base(self) -> Path:
        """Folder of the base."""
        return self.inputs.folders[0]

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        return self.inputs.folders[1]

    @property
    def merged(self) -> Path:
        """Folder of the merged model."""
        return self.inputs.folders[2]

    @property
    def test_set(self) -> Path:
        """Its rows go to both."""
        return self.inputs.test_set


@dataclass(frozen=True)
class MergedRun:
    """What is left of the merged model."""

    side: Side
    identity: ModelIdentity
    texts: Texts | None


@dataclass(frozen=True)
class AdapterRun:
    """What is left of the adapter, and what it says of itself."""

    side: Side
    identity: ModelIdentity
    texts: Texts | None
    work: Workload
    tokenizer: Any
    floor: Floor
    serving: Floor | None
    obstacles: list[str] = field(default_factory=list)
    """What forbids a good grade."""
    findings: list[Finding] = field(default_factory=list)


def run_adapter(asked: Comparison, stack: ExitStack) -> AdapterRun:
    """Run the adapter on its base and measure its floors; the journal of its states stays open on `stack`."""
    scorer = Scorer.load(
        asked.base, asked.test_set, asked.options, asked.route, adapter=asked.adapter, **asked.running
    )
    work, tokenizer = scorer.work, scorer.loaded.tokenizer
    check_vocabulary(scorer.loaded.vocabulary, announced_vocabulary(asked.merged), asked.merged)
    asked.inputs.require_unchanged()
    identity = identify("adapter", asked.base, asked.adapter, scorer.loaded)
    obstacles, findings = compare_tokenizers(work, asked.merged)
    journal = stack.enter_context(
        open_states(asked.states / "adapter.journal", [asked.base, asked.adapter], scorer)
    )
    side = run_side(scorer.part("adapter", journal), "Run adapter")
    floor = noise_floor(scorer, side)
    texts = _texts(asked, "adapter", scorer)
    del scorer  # the model in its serving type comes next: two need not fit into memory
    release_memory()
    serving = _serving(asked, work, side, findings)
    return AdapterRun(side, identity, texts, work, tokenizer, floor, serving, obstacles, findings)


def run_merged(asked: Comparison, work: Workload, stack: ExitStack) -> MergedRun:
    """Run the merged model on the adapter's tokens; the journal of its states stays open on `stack`."""
    scorer = Scorer.load(
        asked.merged,
        asked.test_set,
        asked.options,
        asked.route,
        tokenizer_from=asked.adapter if has_tokenizer(asked.adapter) else asked.base,
        work=work,
        **asked.running,
    )
    asked.inputs.require_unchanged()
    identity = identify("merged", asked.merged, None, scorer.loaded)
    journal = stack.enter_context(open_states(asked.states / "merged.journal", [asked.merged], scorer))
    side = run_side(scorer.part("merged", journal), "Run merged")
    return MergedRun(side, identity, _texts(asked, "merged", scorer))


def generation_of(asked: Comparison, a: AdapterRun, b: MergedRun) -> GenerationComparison | None:
    """Their texts compared, where some were asked for."""
    if asked.generate is None or a.texts is None or b.texts is None:
        return None
    return compare_texts(a.work.examples, a.texts, b.texts, a.tokenizer, asked.generate)


def _texts(asked: Comparison, part: str, scorer: Scorer) -> Texts | None:
    if asked.generate is None:
        return None
    writer = scorer.part(f"{part} texts", asked.texts.get(part))
    return write_texts(writer, asked.generate, f"Generate ({part})", asked.texts.get(f"{part} alone"))


def _serving(asked: Comparison, work: Workload, side: Side, findings: list[Finding]) -> Floor | None:
    """The adapter in the 16 bits that the merged model, else the base, is stored in; None for float32."""
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    stored = [model_config(folder) for folder in (asked.merged, asked.base)]
    named = [str(config.get("dtype") or config.get("torch_dtype")) for config in stored]
    dtype = next((types[name] for name in named if name in types), None)
    if dtype is None:
        return None
    loaded = load_for(asked.options, asked.base, adapter=asked.adapter, dtype=dtype)
    floor = serving_floor(loaded, work, side, asked.route, asked.progress)
    del loaded
    release_memory()
    if is_finite(floor.rows):
        return floor
    findings.append(
        Finding(
            severity="warning",
            code="serving-overflow",
            message=f"computed in {str(dtype).removeprefix('torch.')}, the adapter gives numbers that are "
            "not finite",
            where=asked.adapter.name,
            remedy="serve it in bfloat16 or float32",
        )
    )
    return None


@documented(CompareOptions)
def compare(
    base: StrPath,
    adapter: StrPath,
    merged: StrPath,
    test_set: StrPath,
    output: StrPath | None = None,
    *,
    options: CompareOptions | None = None,
    thresholds: Mapping[str, float] | None = None,
    executor: Executor | None = None,
    progress: Progress = silent,
    **given: Any,
) -> BehaviourProof:
    """Compare the adapter on its base (PEFT's forward, model A) with the merged model (B), token by token.

    The models are held in memory one after the other, in float32; their hidden states at the scored
    positions, 4·H bytes for each, lie on disk meanwhile. `states` is the folder where `validate` has kept
    some, which are then not computed again; what is missing is added. `output` is the file for the record, if
    any; `thresholds` replaces some of `THRESHOLDS`.

    The floor is the adapter against itself, every matrix product adding its terms in another order, which
    needs no second route of the processor. Where a model is stored in 16 bits, the adapter computed in that
    type stands beside it, as it would be served. `generate` also has both models write so
    many tokens at most after each prompt, greedily, and compares them.

    `executor` is where both models run over the rows and write their texts; the floors and the comparison of
    the states, a small part of the work, are computed here. Then `NAME.chunks.jsonl` beside the record tells
    of each batch what computed it, and a finding says where that differs.

    Raises `CheckpointError` for models of different vocabulary.
    """
    chosen = CompareOptions.given(options, given)
    scoring, seed = ScoringOptions.taken_from(chosen), chosen.seed
    adapter, merged = Path(adapter), Path(merged)
    base = local_model(base, [adapter], progress=progress)
    output = None if output is None else Path(output)
    if output is not None:
        require_own_record(output)
    limits = resolve_thresholds(thresholds)
    test_set = local_rows(test_set, chosen)
    inputs = Inputs.of([base, adapter, merged], test_set)
    path = None if output is None else output.with_name(f".{output.name}.journal")
    where, log = executor or Local(), ChunkLog()
    with (
        where,
        open_journal(path, inputs, scoring) as journal,
        open_text_journals(output, inputs, scoring, chosen.generate) as text_journals,
        _states_folder(chosen.states, output) as folder,
    ):
        route = route_of(scoring, journal)
        asked = Comparison(
            inputs, scoring, chosen.generate, progress, route, folder, text_journals, where, log
        )
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
            log.write(chunks, wanted=where.remote)
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


# Any two models on the same tokens, as adapter and merge are compared; without a grade.


def compare_pair(
    a: Path,
    b: Path,
    test_set: Path,
    *,
    work: Path,
    device: str = "auto",
    limit: int | None = None,
    progress: Progress = silent,
) -> tuple[TokenComparison, dict[str, dict[str, TokenComparison]], FileDigest]:
    """The model in folder B against that in A over all rows and by group, and the digest of the file.

    One model is in memory at a time. Rows are encoded by A's tokenizer, both compute in float32. What is
    computed is kept in the folder `work`: a killed comparison goes on from it, and another one of the same
    original does not compute that again. Raises `CheckpointError` for models of different vocabulary.
    """
    options = ScoringOptions(device=device, limit=limit, strict=False)
    of_a, of_both = Inputs.of([a], test_set), Inputs.of([a, b], test_set)
    with ExitStack() as stack:
        # B's results are kept with the digest of A as well: both go by A's route of the arithmetic.
        kept = []
        for name, inputs in (("original", of_a), ("compressed", of_both), ("pairs", of_both)):
            journal = stack.enter_context(open_journal(work / f".{name}.journal", inputs, options))
            assert journal is not None  # there is a path
            kept.append(journal)
        route = route_of(options, kept[0])
        original = Scorer.load(a, test_set, options, route, progress=progress)
        load = original.work
        first = run_side(replace(original, journal=kept[0]), "Original")
        del original
        release_memory()
        compressed = Scorer.load(b, test_set, options, route, tokenizer_from=a, work=load, progress=progress)
        second = run_side(replace(compressed, journal=kept[1]), "Compressed")
        if first.vocabulary != second.vocabulary:
            raise CheckpointError(
                f"one model has {first.vocabulary:,} embedding rows, the other {second.vocabulary:,}",
                expected="two models of one vocabulary",
            )
        rows = compare_sides(load, first, second, route, kept[2], progress)
    of_both.require_unchanged()
    overall = summarise(rows, options.seed)
    return overall, by_group(load.examples, rows, options.seed), of_both.file
