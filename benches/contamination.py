"""What the contamination check finds, and how fast: `python benches/contamination.py`.

With `--real FOLDER`, on real benchmark rows: how many verbatim questions it finds in five wrappings (recall),
and how many rows of one half it flags when the other half is the training data, which it should leave alone.

Without it, rate and memory beside MinHash (datasketch). Synthetic rows of about 120 words with a Zipf
vocabulary; some training rows are planted copies of test rows with 0 to 4 words changed, so that recall can
be counted. `--rows` sets the training rows (default 100,000), `--test` the test rows; datasketch runs on the
first `--minhash-rows` rows only, since it is slower.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from lorasmith.benchmarks.registry import BY_NAME
from lorasmith.data.rows import read_examples
from lorasmith.files.jsonl import read_rows, write_examples, write_rows
from lorasmith.machine.resources import human_bytes, peak_memory, reset_peak_memory
from lorasmith.records.dataset import ContaminationRecord, Example
from lorasmith.testset.build import build
from lorasmith.testset.check import check
from lorasmith.testset.overlap import shingles, words

PLANTED_EVERY = 1000

WRAPPINGS: dict[str, Callable[[str], dict[str, object]]] = {
    "bare": lambda question: {"prompt": question, "response": "I do not know."},
    "turns": lambda question: {"prompt": f"Human: {question}\n\nAssistant:", "response": "No idea at all."},
    "conversation": lambda question: {
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello, what is it?"},
            {"role": "user", "content": f"Here is my question: {question} Thanks!"},
            {"role": "assistant", "content": "Let me think about it."},
        ]
    },
    "template": lambda question: {
        "text": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\nB<|im_end|>"
    },
    "alpaca": lambda question: {"instruction": "Solve it.", "input": question, "output": "It depends."},
}
"""Training rows that hold a question word by word, without its choices and with an answer of no use."""


def real_rows(source: Path, folder: Path, per_benchmark: int = 2000) -> list[Example]:
    """The rows of the real benchmarks below `source`, as test sets are built from them."""
    test = folder / "real.jsonl"
    build(source, test, only=("MMLU", "DROP"), samples_per_benchmark=per_benchmark, strict=False)
    return read_examples(test)


def asked(example: Example) -> tuple[str, str]:
    """Passage and question of a row."""
    return BY_NAME[example.metadata.source].question_in(example.prompt)


def checked(folder: Path, test: Sequence[Example], train: list[dict[str, object]]) -> ContaminationRecord:
    """The check of some test rows against some training rows."""
    write_examples(folder / "test.jsonl", test)
    write_rows(folder / "train.jsonl", train)
    return check(folder / "test.jsonl", [folder / "train.jsonl"])


def missed(folder: Path, rows: Sequence[Example], wrapping: Callable[[str], dict[str, object]]) -> set[str]:
    """The ids of the rows that are not found although question and passage stand in the training data."""
    train = [dict(wrapping("\n".join(asked(row)).strip()), id=row.id) for row in rows]
    record = checked(folder, rows, train)
    found = {
        hit.test_id
        for hit in record.hits
        if hit.kind in ("question", "exact") and hit.train_id == hit.test_id
    }
    return {row.id for row in rows} - found


def halves(rows: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Two halves with nothing in common but the benchmarks' wording: no passage, no text of a question."""
    order = random.Random(seed).sample(rows, len(rows))
    test, rest = order[: len(order) // 2], order[len(order) // 2 :]
    passages = {row.metadata.extra().get("passage_id", row.id) for row in test}
    texts = {_beginning(row) for row in test}
    other = [row for row in rest if row.metadata.extra().get("passage_id", row.id) not in passages]
    return test, [row for row in other if _beginning(row) not in texts]


def _beginning(row: Example) -> str:
    """MMLU has several questions on one text, which each of them holds."""
    return " ".join(row.prompt.split()[:20])


def duplicates(test: Sequence[Example], train: Sequence[Example]) -> set[str]:
    """The ids of the test rows whose question, of 13 words or more, `train` has letter by letter."""
    whole = {row.id: asked(row) for row in (*test, *train)}
    there = {whole[row.id][1].strip() for row in train}
    return {
        row.id
        for row in test
        if not whole[row.id][0] and (own := whole[row.id][1].strip()) in there and len(own.split()) >= 13
    }


def flagged(folder: Path, test: Sequence[Example], train: Sequence[Example]) -> set[str]:
    """The ids of the test rows that count as contaminated."""
    record = checked(folder, test, [row.model_dump(mode="json") for row in train])
    return {hit.test_id for hit in record.hits if record.is_verdict(hit)}


def print_quality(source: Path, seeds: int) -> None:
    """Print two tables: recall by wrapping and length of the question, and clean rows flagged by seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = real_rows(source, folder)
        length = {row.id: len(words(asked(row)[1])) for row in rows}
        bins = ((1, 3), (4, 6), (7, 12), (13, 10**9))
        holders = [{row.id for row in rows if low <= length[row.id] <= high} for low, high in bins]
        kinds = Counter(row.metadata.source for row in rows)
        print(f"{len(rows)} rows: {', '.join(f'{count} of {name}' for name, count in sorted(kinds.items()))}")
        heads = ("1-3 words", "4-6", "7-12", "13 or more", "all")
        print(f"{'verbatim questions found':<26}" + "".join(f"{head:>14}" for head in heads))
        for name, wrapping in WRAPPINGS.items():
            lost = missed(folder, rows, wrapping)
            cells = [f"{len(own - lost)}/{len(own)}" for own in (*holders, set(length))]
            print(f"{name:<26}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
        print(
            f"{'halves':<26}{'test rows':>14}{'training':>14}{'flagged':>14}{'duplicates':>14}{'others':>14}"
        )
        total = wrong = 0
        for seed in range(1, seeds + 1):
            test, train = halves(rows, seed)
            hit, same = flagged(folder, test, train), duplicates(test, train)
            total, wrong = total + len(test) - len(same), wrong + len(hit - same)
            cells = [f"{len(test)}", f"{len(train)}", f"{len(hit)}", f"{len(hit & same)}/{len(same)}"]
            cells.append(f"{len(hit - same) / (len(test) - len(same)):.2%}")
            print(f"{f'seed {seed}':<26}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
        print(f"clean rows flagged: {wrong} of {total}, {wrong / total:.2%}")


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
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--minhash-rows", type=int, default=5_000)
    parser.add_argument("--real", type=Path, help="folder of real benchmark rows (MMLU, DROP)")
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    if given.real is not None:
        print_quality(given.real, given.seeds)
        return
    with tempfile.TemporaryDirectory() as folder:
        test, train, planted = make(Path(folder), given.rows, given.test)
        reset_peak_memory()
        began = time.perf_counter()
        record = check(test, [train])
        seconds = time.perf_counter() - began
        rate = given.rows / seconds
        print(f"{given.rows:,} training rows ({human_bytes(train.stat().st_size)}), {given.test} test rows")
        print(f"{'':<28}{'rows/s':>10}{'ratio':>8}{'10^6 rows':>11}{'peak memory':>13}{'near hits':>11}")
        memory = human_bytes(peak_memory())
        line = f"{rate:>10,.0f}{1:>8.2f}{1e6 / rate:>9.0f} s{memory:>13}{record.counts['near']:>11,}"
        print(f"{'lorasmith check (all kinds)':<28}{line}")
        few = min(given.minhash_rows, given.rows)
        other, hits = with_minhash(test, train, few, 0.8)
        slow = few / other
        print(
            f"{'datasketch MinHash (near)':<28}{slow:>10,.0f}{slow / rate:>8.2f}{1e6 / slow:>9.0f} s"
            f"{human_bytes(peak_memory()):>13}{hits:>11,} of the first {few:,} rows"
        )
        print(f"planted near copies: {planted:,}; counts {record.counts}")


if __name__ == "__main__":
    main()
