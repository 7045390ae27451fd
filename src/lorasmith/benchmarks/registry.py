"""The benchmarks that lorasmith knows, as lists to read. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence

from lorasmith.benchmarks.arc import Arc
from lorasmith.benchmarks.base import Benchmark
from lorasmith.benchmarks.drop import Drop
from lorasmith.benchmarks.gpqa import Gpqa
from lorasmith.benchmarks.gsm8k import Gsm8k
from lorasmith.benchmarks.hellaswag import HellaSwag
from lorasmith.benchmarks.humaneval import HumanEval
from lorasmith.benchmarks.ifeval import IFEval
from lorasmith.benchmarks.maths import Maths
from lorasmith.benchmarks.mbpp import Mbpp
from lorasmith.benchmarks.mmlu import Mmlu
from lorasmith.benchmarks.mmlu_pro import MmluPro
from lorasmith.errors import UsageError

THE_FIVE: tuple[Benchmark, ...] = (
    Drop(),
    Gpqa(),
    HumanEval(),
    Maths(),
    Mmlu(),
)
"""Those of the guide: what is fetched and built where none is named."""

MORE: tuple[Benchmark, ...] = (
    Arc(),
    Gsm8k(),
    HellaSwag(),
    IFEval(),
    Mbpp(),
    MmluPro(),
)
"""Taken where they are named."""

BENCHMARKS = THE_FIVE + MORE
BY_NAME: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def by_name(name: str) -> Benchmark:
    """The benchmark of that name, in any case; raises `UsageError` for an unknown one."""
    for benchmark in BENCHMARKS:
        if benchmark.name.casefold() == name.strip().casefold():
            return benchmark
    raise UsageError(
        f"there is no benchmark named {name!r}",
        expected=", ".join(benchmark.name for benchmark in BENCHMARKS),
    )


def choose(names: Sequence[str] | None) -> tuple[Benchmark, ...]:
    """The named benchmarks in the order of the registry, or the five of the guide."""
    if names is None:
        return THE_FIVE
    wanted = {by_name(name).name for name in names}
    if not wanted:
        raise UsageError("no benchmark was named", expected="at least one name")
    return tuple(benchmark for benchmark in BENCHMARKS if benchmark.name in wanted)
