"""Validation over Ray with 1, 2 and 4 workers of one thread each, against one process of one thread.

    OMP_NUM_THREADS=1 python benches/cluster.py --model BASE --rows 96

Prints the speed-up, the cost of starting, the cost of handing out one chunk, and what follows for 1,000
workers: an arithmetic projection, not a measurement.
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
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import ray

import lorasmith
from lorasmith.executors.base import Recipe
from lorasmith.executors.ray import Cluster

WORKERS = (1, 2, 4)
THOUSAND = 1000


class Nothing:
    """Work that takes no time: what is left is the handing out."""

    def run(self, rows: tuple[int, ...]) -> bytes:
        return b""

    def pack(self, result: bytes) -> bytes:
        return result

    def unpack(self, rows: tuple[int, ...], packed: bytes) -> bytes:
        return packed


@contextmanager
def open_nothing() -> Iterator[Nothing]:
    """The recipe of `Nothing`."""
    yield Nothing()


def seconds(action: Callable[[], object]) -> float:
    """Wall time."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


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
    recipe = Recipe("benches.cluster:open_nothing", {})
    work: Any = Nothing()
    began = time.perf_counter()
    first = None
    for _ in Cluster(threads=1, workers=workers).work_through(
        [(number,) for number in range(chunks)], work, None, recipe
    ):
        first = first or time.perf_counter()
    ended = time.perf_counter()
    assert first is not None
    return first - began, (ended - first) / (chunks - 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=4)
    asked = parser.parse_args()
    joined = seconds(
        lambda: ray.init(
            num_cpus=max(WORKERS),
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
        )
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        test_set = folder / "rows.jsonl"
        write_rows(test_set, asked.rows)

        def validate(executor: Cluster | None, output: str) -> float:
            return seconds(
                lambda: lorasmith.validate(
                    asked.model,
                    test_set,
                    folder / output,
                    batch_size=asked.batch_size,
                    device="cpu",
                    arithmetic="mkl",
                    executor=executor,
                )
            )

        validate(None, "warm")  # the files of the model are in memory from here on
        alone = validate(None, "alone")
        print(f"{os.cpu_count()} processors; Ray joined in {joined:.1f} s; {asked.rows} rows")
        print("| workers | seconds | speed-up | same bytes |\n|---|---|---|---|")
        print(f"| this process | {alone:.1f} | 1.00 | |")
        for workers in WORKERS:
            took = validate(Cluster(threads=1, workers=workers), f"ray{workers}")
            same = (folder / "alone/base.parquet").read_bytes() == (
                folder / f"ray{workers}/base.parquet"
            ).read_bytes()
            print(f"| {workers} | {took:.1f} | {alone / took:.2f} | {'yes' if same else 'NO'} |")
    start, each = hand_out(2, 2000)
    print(f"\nStarting 2 workers: {start:.1f} s. Handing out a chunk: {each * 1e3:.2f} ms.")
    chunks = -(-asked.rows // asked.batch_size)
    work = alone / chunks
    print(
        f"Projection, not measured: one driver feeds at most 1/{each:.5f} = {1 / each:,.0f} chunks a second,"
        f" so {THOUSAND:,} workers are kept busy by chunks of {THOUSAND} · {each * 1e3:.2f} ms ="
        f" {THOUSAND * each:.2f} s or longer; here a chunk takes {work:.2f} s."
    )


if __name__ == "__main__":
    main()
