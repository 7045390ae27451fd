"""Validation over Ray with 1, 2 and 4 workers of one thread each, against one process of one thread.

    OMP_NUM_THREADS=1 python -m benches.cluster --model BASE --rows 40

Prints speed-up and overhead, the cost of starting, of handing out a chunk and of looking at 1,000 workers,
and what follows for so many: an arithmetic projection, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import ray

import lorasmith
from lorasmith.executors.base import Unsplittable, WorkSpec
from lorasmith.executors.ray import Cluster
from lorasmith.records.scoring import Conditions

WORKERS = (1, 2, 4)
THOUSAND = 1000


class Nothing(Unsplittable):
    """Work that takes no time: what is left is the handing out."""

    def run(self, rows: tuple[int, ...]) -> bytes:
        return b""

    def pack(self, result: bytes) -> bytes:
        return result

    def unpack(self, rows: tuple[int, ...], packed: bytes) -> bytes:
        return packed

    def conditions(self) -> Conditions:
        return Conditions(device="cpu", processor="any", threads=1)


@contextmanager
def open_nothing() -> Iterator[Nothing]:
    """Open `Nothing`."""
    yield Nothing()


@dataclass
class Watch:
    """A progress that notes when the first batch is there, and how many tokens come after it."""

    began: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    tokens: int = 0

    @contextmanager
    def __call__(self, label: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            if not self.first:
                self.first = time.perf_counter()
            else:
                self.tokens += count

        yield advance

    def line(self, name: str) -> tuple[str, float]:
        """A row of the table without its end, and tokens a second behind the first batch."""
        ended = time.perf_counter()
        rate = self.tokens / (ended - self.first)
        return f"| {name} | {ended - self.began:.1f} | {self.first - self.began:.1f} | {rate:.0f}", rate


def write_rows(path: Path, count: int) -> None:
    """Prompts and responses of mixed lengths."""
    chosen = random.Random(0)
    words = ["merge", "weights", "the", "adapter", "of", "a", "model", "is", "rounded", "when", "tested"]
    with path.open("w") as handle:
        for number in range(count):
            prompt = " ".join(chosen.choices(words, k=chosen.randint(20, 60)))
            response = " ".join(chosen.choices(words, k=chosen.randint(40, 160)))
            handle.write(json.dumps({"id": str(number), "prompt": prompt, "response": response}) + "\n")


def hand_out(workers: int, chunks: int) -> tuple[float, float]:
    """Seconds to start the workers, and seconds for each chunk of no work at all."""
    from benches.cluster import open_nothing  # not that of `__main__`, which no worker can import

    spec = WorkSpec(open_nothing, {})
    began = time.perf_counter()
    first = None
    for _ in Cluster(threads=1, workers=workers).map_chunks(
        [(number,) for number in range(chunks)], Nothing(), None, spec
    ):
        first = first or time.perf_counter()
    ended = time.perf_counter()
    assert first is not None
    return first - began, (ended - first) / (chunks - 1)


def look(pending: int) -> float:
    """Seconds of one look at so many answers that are not there."""

    class Busy:
        def wait(self) -> None:
            time.sleep(3600)

    kind: Any = ray.remote(Busy)
    worker = kind.options(num_cpus=0).remote()
    answers = [worker.wait.remote() for _ in range(pending)]
    took = []
    for _ in range(20):
        began = time.perf_counter()
        ray.wait(answers, num_returns=1, timeout=0)
        took.append(time.perf_counter() - began)
    ray.kill(worker)
    return median(took)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    asked = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    began = time.perf_counter()
    ray.init(
        address="local",
        num_cpus=max(WORKERS),
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": f"{root}:{root / 'src'}"}},
    )
    joined = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        test_set = folder / "rows.jsonl"
        write_rows(test_set, asked.rows)

        def validate(output: str, executor: Cluster | None = None, limit: int | None = None) -> Watch:
            watch = Watch()
            lorasmith.validate(
                asked.model,
                test_set,
                folder / output,
                batch_size=asked.batch_size,
                device="cpu",
                arithmetic="mkl",
                limit=limit,
                executor=executor,
                progress=watch,
            )
            return watch

        validate("warm", limit=asked.batch_size)  # the files of the model are in memory from here on
        print(f"{os.cpu_count()} processors; Ray joined in {joined:.1f} s; {asked.rows} rows")
        print("| workers | seconds | until the first batch | tokens/s then | speed-up | same bytes |")
        print("|---|---|---|---|---|---|")
        row, alone = validate("alone").line("this process")
        print(f"{row} | 1.00 | |", flush=True)
        for workers in WORKERS:
            row, rate = validate(f"ray{workers}", Cluster(threads=1, workers=workers)).line(str(workers))
            files = [folder / place / "base.parquet" for place in ("alone", f"ray{workers}")]
            same = files[0].read_bytes() == files[1].read_bytes()
            print(f"{row} | {rate / alone:.2f} | {'yes' if same else 'NO'} |", flush=True)
    start, each = hand_out(2, 2000)
    seen = look(THOUSAND)
    print(f"\nStarting 2 workers without a model: {start:.1f} s. Handing out a chunk: {each * 1e3:.2f} ms.")
    print(f"A look at {THOUSAND:,} workers: {seen * 1e3:.2f} ms.")
    shortest = THOUSAND * each + 2 * seen
    arithmetic = f"{THOUSAND:,} · {each * 1e3:.2f} ms + 2 · {seen * 1e3:.2f} ms = {shortest:.2f} s"
    print(
        f"Projection, not measured: a round in which each of {THOUSAND:,} workers gets a chunk costs the"
        f" driver {arithmetic}. Chunks that take longer keep all workers busy; shorter ones come at"
        f" {THOUSAND / shortest:,.0f} a second at most."
    )


if __name__ == "__main__":
    main()
