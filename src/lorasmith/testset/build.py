"""Build a test set from public benchmarks: N rows of each, chosen by seed, every row accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorasmith.benchmarks.base import Benchmark
from lorasmith.benchmarks.discover import Candidate, Found, read_folder
from lorasmith.benchmarks.registry import BENCHMARKS, by_name, choose
from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import write_record
from lorasmith.files.jsonl import write_examples
from lorasmith.progress import Progress, silent
from lorasmith.records.base import Finding
from lorasmith.records.dataset import DatasetFindings, DatasetStatistics, Example, Metadata
from lorasmith.testset import difficulty as policies
from lorasmith.testset.duplicates import across_benchmarks, within_benchmark
from lorasmith.testset.sampling import allocate, require_size, sort_key
from lorasmith.testset.statistics import count, digest


def build(
    benchmarks: Path,
    output: Path,
    *,
    samples_per_benchmark: int | Mapping[str, int] = 100,
    only: Sequence[str] | None = None,
    difficulty: str = "guide",
    losses: Mapping[str, float] | None = None,
    seed: int = 42,
    strict: bool = True,
    progress: Progress = silent,
) -> DatasetStatistics:
    """Sample each benchmark found below `benchmarks` into `output` (JSONL).

    `statistics.json` and `findings.json` are written beside it; the findings are written even when the
    build stops. `losses` (example id → nats per token of the base model) is needed for the `measured`
    policy only.

    Raises `UsageError` for unknown names or sizes, `DataError` when a wanted benchmark is absent or, with
    `strict`, when anything is wrong with the files.
    """
    policies.require_policy(difficulty)
    if (difficulty == "measured") != (losses is not None):
        raise UsageError(
            "the policy 'measured' and measured losses belong together",
            remedy="build with another policy, validate the base model on the result, then build again with "
            "its losses",
        )
    wanted = choose(only)
    sizes = _sizes(samples_per_benchmark, wanted)
    with progress("Read benchmarks", total=len(wanted), unit="set") as advance:
        found = read_folder(benchmarks, BENCHMARKS, wanted, seed=seed)
        advance(len(wanted))
    _report_absent(wanted, found, benchmarks)
    found.findings += across_benchmarks(found.candidates)
    examples = []
    for benchmark in wanted:
        chosen = _sample(benchmark, found, sizes[benchmark.name], seed)
        examples += [_example(benchmark, candidate, difficulty) for candidate in chosen]
    if losses is not None:
        examples = policies.by_loss(examples, losses)
    _write_findings(output, found)
    _stop_on_errors(found, output, strict, examples)
    write_examples(output, examples)
    statistics = count(examples, digest(output), seed=seed, asked=sizes, findings=found.findings)
    write_record(output.parent / "statistics.json", statistics)
    return statistics


def _sizes(asked: int | Mapping[str, int], wanted: Sequence[Benchmark]) -> dict[str, int]:
    if isinstance(asked, int):
        sizes = {benchmark.name: asked for benchmark in wanted}
    else:
        named = {by_name(name).name: size for name, size in asked.items()}
        unused = sorted(set(named) - {benchmark.name for benchmark in wanted})
        if unused:
            raise UsageError(f"a sample size is given for {', '.join(unused)}, which is not in use")
        lacking = [benchmark.name for benchmark in wanted if benchmark.name not in named]
        if lacking:
            raise UsageError(
                f"no sample size is given for {', '.join(lacking)}",
                expected="a size for each benchmark in use, or one for all",
            )
        sizes = {benchmark.name: named[benchmark.name] for benchmark in wanted}
    for name, size in sizes.items():
        require_size(size, f"the sample size of {name}")
    return sizes


def _report_absent(wanted: Sequence[Benchmark], found: Found, root: Path) -> None:
    for benchmark in wanted:
        if not found.candidates[benchmark.name]:
            found.findings.append(
                Finding(
                    severity="error",
                    code="missing-benchmark",
                    message=f"no usable rows of {benchmark.name} were found",
                    where=root.name,
                    expected=f"a public layout of {benchmark.name} ({benchmark.source})",
                    remedy="add its file, or name the benchmarks you want with --only",
                )
            )


def _sample(benchmark: Benchmark, found: Found, size: int, seed: int) -> list[Candidate]:
    """`size` rows, shared among the strata (subdomain and own difficulty), in the order of their hashes.

    The strata do not depend on the difficulty policy, so another policy relabels the same rows.
    """
    name = benchmark.name
    keyed = sorted(
        ((sort_key(seed, name, candidate.row.value), candidate) for candidate in found.candidates[name]),
        key=lambda pair: (pair[0], pair[1].row.file, pair[1].row.number),
    )
    distinct, findings, rejected = within_benchmark(name, keyed)
    found.findings += findings
    found.rejected += rejected
    if len(distinct) < size:
        found.findings.append(
            Finding(
                severity="warning",
                code="fewer-than-asked",
                message=f"{name} has {len(distinct)} usable rows, {size} were asked for: all are taken",
            )
        )
    strata: dict[str, list[tuple[bytes, Candidate]]] = {}
    for key, candidate in distinct:
        strata.setdefault(f"{candidate.item.subdomain} / {candidate.item.native}", []).append(
            (key, candidate)
        )
    shares = allocate({stratum: len(rows) for stratum, rows in strata.items()}, size, seed)
    chosen = [pair for stratum, rows in strata.items() for pair in rows[: shares[stratum]]]
    return [candidate for _, candidate in sorted(chosen, key=lambda pair: pair[0])]


def _example(benchmark: Benchmark, candidate: Candidate, policy: str) -> Example:
    item, row = candidate.item, candidate.row
    level, origin = policies.label(policy, benchmark, item)
    record_id = item.record_id
    prefix = "" if record_id.startswith(f"{benchmark.name}/") else f"{benchmark.name}/"
    extra = {"subdomain": item.subdomain, **item.extra}
    if item.native:
        extra["native_difficulty"] = item.native
    return Example(
        id=prefix + record_id,
        prompt=item.prompt,
        response=item.response,
        metadata=Metadata(
            source=benchmark.name,
            domain=benchmark.domain,
            difficulty=level,
            difficulty_from=origin,
            record_id=record_id,
            file=row.file,
            sha256=row.sha256,
            **extra,
        ),
    )


def _write_findings(output: Path, found: Found) -> None:
    rejected = sorted(found.rejected, key=lambda row: (row.benchmark, row.file, row.row))
    record = DatasetFindings(findings=found.findings, rejected=rejected)
    write_record(output.parent / "findings.json", record)


def _stop_on_errors(found: Found, output: Path, strict: bool, examples: Sequence[Example]) -> None:
    errors = [finding for finding in found.findings if finding.severity == "error"]
    if errors and (strict or not examples):
        first = errors[0]
        more = f" (and {len(errors) - 1} more findings)" if len(errors) > 1 else ""
        raise DataError(
            f"{first.message}{more}; all are listed in {output.parent / 'findings.json'}",
            where=first.where,
            expected=first.expected,
            remedy=first.remedy,
        )
