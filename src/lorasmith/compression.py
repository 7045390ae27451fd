"""Compress a model in one way or in several, each measured against the original as a merge is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from lorasmith.errors import UsageError, os_errors
from lorasmith.files.atomic import write_record
from lorasmith.files.jsonl import read_examples
from lorasmith.files.machine import human_bytes
from lorasmith.files.paths import StrPath
from lorasmith.followup.compress import compress as quantize
from lorasmith.followup.compress_settings import CompressSettings
from lorasmith.gates.tasks import MAIN_METRICS
from lorasmith.progress import Progress, silent
from lorasmith.proving.behaviour_pair import compare_pair
from lorasmith.records.compression import CompressionsRecord, CompressRecord, TaskQuality
from lorasmith.scoring.paired_groups import paired_quality
from lorasmith.scoring.tasks import answerable, evaluate_tasks

RECORD = "compressions.json"


def compress(
    model: StrPath,
    output: StrPath,
    *,
    settings: CompressSettings | None = None,
    calibration: StrPath | None = None,
    test_set: StrPath | None = None,
    tasks: bool = True,
    limit: int | None = None,
    limits: Mapping[str, float] | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> CompressRecord:
    """Quantize the model in a folder, write it to `output`, and measure what it lost on `test_set`.

    Token by token in float32 and, with `tasks`, on the questions of benchmarks among the first `limit` rows.
    `limits` sets gates: `perplexity_ratio`, `mean_kl` and `q99_kl` (nats), `top1_agreement`, `accuracy_drop`
    (0..1), `bytes`. A finished output of the same inputs and settings is kept. What is raised stands at
    `followup.compress.compress`.
    """
    with TemporaryDirectory(prefix="lorasmith-") as folder:
        return quantize(
            model,
            output,
            settings=settings,
            calibration=calibration,
            test_set=test_set,
            compare=compare_pair,
            ask=TaskPair(Path(folder)) if tasks else None,
            limit=limit,
            limits=limits,
            device=device,
            progress=progress,
        )


def compress_several(
    model: StrPath,
    output: StrPath,
    ways: Sequence[CompressSettings],
    *,
    calibration: StrPath | None = None,
    test_set: StrPath | None = None,
    tasks: bool = True,
    limit: int | None = None,
    limits: Mapping[str, float] | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> CompressionsRecord:
    """Compress a model in several ways, each to a folder of its own below `output`, and say which to take.

    Writes `compressions.json` beside the folders. The options are those of `compress`; the original answers
    the benchmarks' questions once. Raises `UsageError` before any work for ways that are the same.
    """
    names = [way.name for way in ways]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled or not ways:
        raise UsageError(
            f"{doubled[0]} is asked for more than once" if doubled else "no format is asked for",
            expected="each format and method once",
        )
    for way in ways:
        way.check()
    place = Path(output)
    with os_errors(place, "write"):
        place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="lorasmith-") as folder:
        ask = TaskPair(Path(folder)) if tasks else None
        found = [
            quantize(
                model,
                place / name,
                settings=way,
                calibration=calibration,
                test_set=test_set,
                compare=compare_pair,
                ask=ask,
                limit=limit,
                limits=limits,
                device=device,
                progress=progress,
            )
            for name, way in zip(names, ways, strict=True)
        ]
    record = _recommend(names, found)
    write_record(place / RECORD, record)
    return record


class TaskPair:
    """The benchmarks' questions to an original, once, and to models that were made of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._asked: set[tuple[Path, Path, int | None]] = set()

    def __call__(
        self,
        model: Path,
        compressed: Path,
        test_set: Path,
        *,
        device: str,
        limit: int | None,
        progress: Progress,
    ) -> TaskQuality | None:
        """None where the rows hold no question, or none has a verdict for both models."""
        examples = read_examples(test_set)[:limit]
        if not any(answerable(example) for example in examples):
            return None
        key = (model, test_set, limit)
        roles = {"original": model, "compressed": compressed}
        for role, folder in roles.items():
            if role == "compressed" or key not in self._asked:
                evaluate_tasks(
                    folder, test_set, self.folder, role=role, device=device, limit=limit, progress=progress
                )
        self._asked = {key}
        a, b = (self.folder / f"{role}_tasks.parquet" for role in roles)
        return paired_quality(a, b, examples, MAIN_METRICS)


def _recommend(names: list[str], found: list[CompressRecord]) -> CompressionsRecord:
    """The smallest that passes every gate."""
    passed = [
        (record.bytes, name, record) for name, record in zip(names, found, strict=True) if record.passed
    ]
    if passed:
        _, recommended, record = min(passed, key=lambda one: one[:2])
        quality = record.quality
        assert quality is not None  # gates were judged on it
        reason = (
            f"{recommended} is the smallest that passes every gate: {human_bytes(record.bytes)}, mean KL "
            f"{quality.kl.mean:.4f}, the same next token at {quality.top1_agreement:.2%}"
        )
    else:
        recommended = None
        measured = any(record.passed is not None for record in found)
        reason = "none passes every gate" if measured else "nothing was measured: no test set was given"
    return CompressionsRecord(folders=names, compressed=found, recommended=recommended, reason=reason)
