"""Build a test set from public benchmarks: N rows of each, chosen by seed, every row accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.benchmarks.base import Benchmark, SourceRow
from lorasmith.benchmarks.discover import Candidate, FolderContents, read_folder, reject
from lorasmith.benchmarks.registry import BENCHMARKS, by_name, choose
from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import write_record
from lorasmith.files.jsonl import write_examples
from lorasmith.files.output_folder import require_own_record
from lorasmith.options import BuildOptions
from lorasmith.options.keywords import documented
from lorasmith.progress import Progress, silent
from lorasmith.records.base import Finding
from lorasmith.records.dataset import DatasetFindings, DatasetStatistics, Example, Metadata, RejectedRow
from lorasmith.testset import difficulty as policies
from lorasmith.testset.overlap import normalise, repeats, shingles, tokens
from lorasmith.testset.rows import count, digest, require_own_rows
from lorasmith.testset.sampling import allocate, require_size, sort_key

# Drop repeated questions of a benchmark before sampling, and find questions that two benchmarks share.


_SHINGLE = 3
_NEARLY = 0.9
"""Jaccard similarity of runs of three words and signs. One number changed in a problem of 60 words gives
0.90, in a shorter one less: those are other questions and stay."""
_TELLING_WORDS = 8
"""Shorter questions ("Which of the following is true?") stand in several benchmarks by chance."""

Keyed = tuple[bytes, Candidate]


def within_benchmark(
    name: str, keyed: Sequence[Keyed]
) -> tuple[list[Keyed], list[Finding], list[RejectedRow]]:
    """Keep the first of each question in the order given; returns kept rows, findings, rejected rows.

    Two different questions under one record id are an error: one of them is not what it says.
    """
    kept: list[Keyed] = []
    findings: list[Finding] = []
    rejected: list[RejectedRow] = []
    questions: set[tuple[str, str]] = set()
    ids: dict[str, SourceRow] = {}
    repeated = 0
    for key, candidate in keyed:
        item, row = candidate.item, candidate.row
        question = (item.scope, normalise(item.question))
        if question in questions:
            repeated += 1
            rejected.append(reject(name, row, "the same question stands in another row"))
        elif item.record_id in ids:
            other = ids[item.record_id]
            rejected.append(reject(name, row, "another question has the same id"))
            findings.append(
                Finding(
                    severity="error",
                    code="duplicate-id",
                    message=f"two different rows of {name} have the id {item.record_id!r}",
                    where=f"{row.file}:{row.number}",
                    expected=f"each id once (also {other.file}:{other.number})",
                    remedy="replace the file with the published one",
                )
            )
        else:
            questions.add(question)
            ids[item.record_id] = row
            kept.append((key, candidate))
    kept, near = _without_near(name, kept)
    if repeated or near:
        message = f"{repeated} repeated and {len(near)} nearly repeated questions of {name} were dropped"
        findings.append(Finding(severity="note", code="duplicates-dropped", message=message))
    return kept, findings, rejected + near


def _without_near(name: str, keyed: Sequence[Keyed]) -> tuple[list[Keyed], list[RejectedRow]]:
    items = [candidate.item for _, candidate in keyed]
    flags = repeats(
        [shingles(tokens(item.question), _SHINGLE) for item in items],
        [item.scope for item in items],
        _NEARLY,
    )
    reason = "nearly the same question stands in another row"
    kept = [pair for pair, repeated in zip(keyed, flags, strict=True) if not repeated]
    dropped = [pair[1].row for pair, repeated in zip(keyed, flags, strict=True) if repeated]
    return kept, [reject(name, row, reason) for row in dropped]


def across_benchmarks(candidates: Mapping[str, Sequence[Candidate]]) -> list[Finding]:
    """One error for each pair of benchmarks that hold the same question: one file is not what it says."""
    seen: dict[str, tuple[str, SourceRow]] = {}
    shared: dict[tuple[str, str], list[tuple[SourceRow, SourceRow]]] = {}
    for name in sorted(candidates):
        for candidate in candidates[name]:
            question = normalise(candidate.item.question)
            if question.count(" ") + 1 < _TELLING_WORDS:
                continue
            other, row = seen.setdefault(question, (name, candidate.row))
            if other != name:
                shared.setdefault((other, name), []).append((row, candidate.row))
    return [
        Finding(
            severity="error",
            code="same-question",
            message=f"{len(rows)} questions stand under both {first} and {second}",
            where=f"{rows[0][0].file}:{rows[0][0].number} and {rows[0][1].file}:{rows[0][1].number}",
            expected="each question under one benchmark",
            remedy="replace the wrong file with the published one",
        )
        for (first, second), rows in sorted(shared.items())
    ]


@documented(BuildOptions)
def build(
    benchmarks: Path,
    output: Path,
    *,
    options: BuildOptions | None = None,
    losses: Mapping[str, float] | None = None,
    progress: Progress = silent,
    **given: Any,
) -> DatasetStatistics:
    """Sample each benchmark found below `benchmarks` into `output` (JSONL).

    `statistics.json` and `findings.json` are written beside it; the findings are written even when the
    build stops. `losses` (example id → nats per token of the base model) is needed for the `measured`
    policy only.

    Raises `UsageError` for unknown names or sizes, `DataError` when a wanted benchmark is absent or, with
    `strict`, when anything is wrong with the files.
    """
    asked = BuildOptions.given(options, given)
    difficulty, seed = asked.difficulty, asked.seed
    if (difficulty == "measured") != (losses is not None):
        raise UsageError(
            "the policy 'measured' and measured losses belong together",
            remedy="build with another policy, validate the base model on the result, then build again with "
            "its losses",
        )
    statistics_file, findings_file = (output.parent / name for name in ("statistics.json", "findings.json"))
    require_own_rows(output)
    for record in (statistics_file, findings_file):
        require_own_record(record)
    wanted = choose(asked.only or None)
    sizes = _sizes(asked, wanted)
    with progress("Read benchmarks", total=len(wanted), unit="set") as advance:
        contents = read_folder(benchmarks, BENCHMARKS, wanted, seed=seed)
        advance(len(wanted))
    _report_absent(wanted, contents, benchmarks)
    if not asked.only:
        _report_unwanted(contents)
    contents.findings += across_benchmarks(contents.candidates)
    examples = []
    for benchmark in wanted:
        chosen = _sample(benchmark, contents, sizes[benchmark.name], seed)
        examples += [_example(benchmark, candidate, difficulty) for candidate in chosen]
    if losses is not None:
        examples = policies.by_loss(examples, losses)
    _write_findings(findings_file, contents)
    _stop_on_errors(contents, output, asked.strict, examples)
    write_examples(output, examples)
    statistics = count(examples, digest(output), seed=seed, asked=sizes, findings=contents.findings)
    write_record(statistics_file, statistics)
    return statistics


def _sizes(asked: BuildOptions, wanted: Sequence[Benchmark]) -> dict[str, int]:
    """Rows of each benchmark; raises `UsageError` for a size that is none, or of a benchmark not in use."""
    sizes = {benchmark.name: asked.samples_per_benchmark for benchmark in wanted}
    for entry in asked.samples:
        named, _, size = entry.partition("=")
        if not size.strip().lstrip("-").isdigit():
            raise UsageError(f"--samples {entry!r} gives no size", expected="NAME=ROWS, such as MATH=50")
        name = by_name(named).name
        if name not in sizes:
            raise UsageError(f"a sample size is given for {name}, which is not in use")
        require_size(int(size), f"the sample size of {name}")
        sizes[name] = int(size)
    return sizes


def _report_absent(wanted: Sequence[Benchmark], contents: FolderContents, root: Path) -> None:
    for benchmark in wanted:
        if not contents.candidates[benchmark.name]:
            contents.findings.append(
                Finding(
                    severity="error",
                    code="missing-benchmark",
                    message=f"no usable rows of {benchmark.name} were found",
                    where=root.name,
                    expected=f"a public layout of {benchmark.name} ({benchmark.source})",
                    remedy="add its file, or name the benchmarks you want with --only",
                )
            )


def _report_unwanted(contents: FolderContents) -> None:
    for name, files in sorted(contents.unwanted.items()):
        more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        contents.findings.append(
            Finding(
                severity="note",
                code="not-asked-for",
                message=f"{name} is here ({files[0]}{more}) and was not asked for",
                where=files[0],
                remedy="name all that you want with --only",
            )
        )


def _sample(benchmark: Benchmark, contents: FolderContents, size: int, seed: int) -> list[Candidate]:
    """`size` rows, shared among the strata (subdomain and own difficulty), in the order of their hashes.

    The strata do not depend on the difficulty policy, so another policy relabels the same rows.
    """
    name = benchmark.name
    keyed = sorted(
        ((sort_key(seed, name, candidate.row.value), candidate) for candidate in contents.candidates[name]),
        key=lambda pair: (pair[0], pair[1].row.file, pair[1].row.number),
    )
    distinct, findings, rejected = within_benchmark(name, keyed)
    contents.findings += findings
    contents.rejected += rejected
    if len(distinct) < size:
        contents.findings.append(
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


def _write_findings(file: Path, contents: FolderContents) -> None:
    rejected = sorted(contents.rejected, key=lambda row: (row.benchmark, row.file, row.row))
    record = DatasetFindings(findings=contents.findings, rejected=rejected)
    write_record(file, record)


def _stop_on_errors(
    contents: FolderContents, output: Path, strict: bool, examples: Sequence[Example]
) -> None:
    errors = [finding for finding in contents.findings if finding.severity == "error"]
    if errors and (strict or not examples):
        first = errors[0]
        more = f" (and {len(errors) - 1} more findings)" if len(errors) > 1 else ""
        raise DataError(
            f"{first.message}{more}; all are listed in {output.parent / 'findings.json'}",
            where=first.where,
            expected=first.expected,
            remedy=first.remedy,
        )
