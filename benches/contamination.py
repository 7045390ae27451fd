"""Rate and memory of the contamination check, beside MinHash (datasketch): `python benches/contamination.py`.

Synthetic rows of about 120 words with a Zipf vocabulary; some training rows are planted copies of test rows
with 0 to 4 words changed, so that recall can be counted. `--rows` sets the training rows (default 100,000),
`--test` the test rows; datasketch runs on the first `--minhash-rows` rows only, since it is slower.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from itertools import islice
from pathlib import Path

from lorasmith.data.rows import read_examples
from lorasmith.files.jsonl import read_rows
from lorasmith.machine.resources import human_bytes, peak_memory, reset_peak_memory
from lorasmith.testset.check import check
from lorasmith.testset.overlap import shingles, words

PLANTED_EVERY = 1000


def make(folder: Path, rows: int, test_rows: int) -> tuple[Path, Path, int]:
    """Write a test set and a training file; returns both and the number of planted near copies."""
    draw = random.Random(0)
    vocabulary = [f"w{number}" for number in range(50_000)]
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    pool = draw.choices(vocabulary, weights, k=2_000_000)

    def text(count: int) -> list[str]:
        start = draw.randrange(len(pool) - count)
        return [
            pool[start + (7 * place) % count] if place % 3 else draw.choice(pool) for place in range(count)
        ]

    tests = [text(80) for _ in range(test_rows)]
    test, train = folder / "test.jsonl", folder / "train.jsonl"
    with test.open("w") as handle:
        for number, prompt in enumerate(tests):
            handle.write(
                json.dumps({"id": f"t{number}", "prompt": " ".join(prompt), "response": "yes"}) + "\n"
            )
    planted = 0
    with train.open("w") as handle:
        for number in range(rows):
            prompt = text(80)
            if number % PLANTED_EVERY == 0:
                prompt = list(tests[(number // PLANTED_EVERY) % test_rows])
                for _ in range(draw.randrange(5)):
                    prompt[draw.randrange(80)] = "changed"
                planted += 1
            row = {"id": f"r{number}", "prompt": " ".join(prompt), "response": " ".join(text(40))}
            handle.write(json.dumps(row) + "\n")
    return test, train, planted


def with_minhash(test: Path, train: Path, rows: int, threshold: float) -> tuple[float, int]:
    """Seconds and hits of datasketch: 128 permutations, an index of the test set, a query per row."""
    from datasketch import MinHash, MinHashLSH

    def sketch(prompt: str) -> MinHash:
        made = MinHash(num_perm=128)
        made.update_batch([" ".join(shingle).encode() for shingle in shingles(words(prompt), 3)])
        return made

    index = MinHashLSH(threshold=threshold, num_perm=128)
    sketches = {example.id: sketch(example.prompt) for example in read_examples(test)}
    for name, made in sketches.items():
        index.insert(name, made)
    began, hits = time.perf_counter(), 0
    for _, row in islice(read_rows(train), rows):
        made = sketch(row["prompt"])
        hits += sum(made.jaccard(sketches[name]) >= threshold for name in index.query(made))
    return time.perf_counter() - began, hits


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--minhash-rows", type=int, default=5_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        test, train, planted = make(Path(folder), asked.rows, asked.test)
        reset_peak_memory()
        began = time.perf_counter()
        record = check(test, [train])
        seconds = time.perf_counter() - began
        rate = asked.rows / seconds
        print(f"{asked.rows:,} training rows ({human_bytes(train.stat().st_size)}), {asked.test} test rows")
        print(f"{'':<28}{'rows/s':>10}{'ratio':>8}{'10^6 rows':>11}{'peak memory':>13}{'near hits':>11}")
        memory = human_bytes(peak_memory())
        line = f"{rate:>10,.0f}{1:>8.2f}{1e6 / rate:>9.0f} s{memory:>13}{record.counts['near']:>11,}"
        print(f"{'lorasmith check (all kinds)':<28}{line}")
        few = min(asked.minhash_rows, asked.rows)
        other, hits = with_minhash(test, train, few, 0.8)
        slow = few / other
        print(
            f"{'datasketch MinHash (near)':<28}{slow:>10,.0f}{slow / rate:>8.2f}{1e6 / slow:>9.0f} s"
            f"{human_bytes(peak_memory()):>13}{hits:>11,} of the first {few:,} rows"
        )
        print(f"planted near copies: {planted:,}; counts {record.counts}")


if __name__ == "__main__":
    main()
