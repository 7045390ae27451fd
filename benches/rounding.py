"""What the roundings cost, and what they keep.

    python benches/rounding.py cost --parameters 5e7,2e8,1e9
    python benches/rounding.py quality --base BASE --adapter ADAPTER --train train.jsonl \\
        --test-set test.jsonl --keep FOLDER
    python benches/rounding.py plot --merge MERGED --output docs/images/swallowed.svg

`cost`: seconds and peak memory of a merge in each mode, on random Llama models, each in a process of its own.
`quality`: every mode against the adapter on unseen rows; calibrated rounding over disjoint draws of the
training rows, medians, and each source on its own; with `--budgets`, over numbers of tokens instead. What is
measured is kept in `--keep`, so that the same command goes on where it was stopped. `plot`: what rounding to
nearest swallowed in each tensor, from merges' own records.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from merge import make_inputs  # beside this file
from rounding_plot import plot
from rounding_quality import PLAIN, Quality, show_medians, show_sources
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MODES = ("nearest", "dithered", "calibrated")
DRAWS = 5
WORDS = 32_000
"""Of the random models' vocabulary."""

CHILD = """
import json, sys, time
from pathlib import Path
import torch
from lorasmith.machine.resources import peak_memory
from lorasmith.merging.merge import merge
idle = peak_memory()
begin = time.monotonic()
merge(*{folders!r}, rounding={mode!r}, calibration={rows!r}, template="plain")
print(json.dumps({{"seconds": time.monotonic() - begin, "memory": peak_memory() - idle}}))
"""


def cost(sizes: Sequence[float], tokens: int, repeats: int) -> None:
    """One line per size and mode."""
    print(f"{'parameters':>12} {'mode':>12} {'seconds':>9} {'peak MB':>9}   ({tokens:,} calibration tokens)")
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base, adapter, parameters = make_inputs(folder, size, 16)
            _tokenizer().save_pretrained(base)
            rows = _random_rows(folder / "rows.jsonl", tokens)
            for mode in MODES:
                found = [_child(base, adapter, folder / f"{mode}-{n}", mode, rows) for n in range(repeats)]
                seconds = statistics.median(one["seconds"] for one in found)
                memory = statistics.median(one["memory"] for one in found) / 1e6
                print(f"{parameters:>12.3g} {mode:>12} {seconds:>9.1f} {memory:>9.0f}", flush=True)


def _child(base: Path, adapter: Path, output: Path, mode: str, rows: Path) -> dict[str, float]:
    given = str(rows) if mode == "calibrated" else None
    code = CHILD.format(folders=[str(base), str(adapter), str(output)], mode=mode, rows=given)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _tokenizer() -> PreTrainedTokenizerFast:
    """A word per number, so that random rows have as many tokens as they should."""
    words = Tokenizer(models.WordLevel({str(n): n for n in range(WORDS)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1")


def _random_rows(path: Path, tokens: int, length: int = 256) -> Path:
    drawn = np.random.default_rng(0).integers(2, WORDS, size=(max(1, tokens // length), length - 1))
    metadata = {"source": "random", "domain": "numbers", "difficulty": "easy"}
    with path.open("w") as handle:
        for place, row in enumerate(drawn.tolist()):
            words = [str(word) for word in row]
            example = {"id": str(place), "prompt": " ".join(words[:-8]), "response": " ".join(words[-8:])}
            handle.write(json.dumps({**example, "metadata": metadata}) + "\n")
    return path


def quality(measured: Quality, modes: Sequence[str], draws: int, rows: int | None) -> None:
    """One line per mode, medians over the draws, and the sources of the test set."""
    found = measured.plain(modes)
    if draws:
        drawn = measured.draws(draws, rows)
        if "nearest" in found:
            show_medians(found["nearest"], drawn)
    found["calibrated"] = measured.measure("calibrated, all rows", measured.train)
    show_sources(found)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cost")
    one.add_argument("--parameters", default="5e7,2e8")
    one.add_argument("--tokens", type=int, default=4096)
    one.add_argument("--repeats", type=int, default=1)
    two = commands.add_parser("quality")
    for name in ("base", "adapter", "train", "test-set", "keep"):
        two.add_argument(f"--{name}", type=Path, required=True)
    two.add_argument("--modes", default=",".join(PLAIN))
    two.add_argument("--draws", type=int, default=DRAWS, help="0: only calibrated on all rows")
    two.add_argument("--rows", type=int, help="of a draw")
    two.add_argument("--budgets", default="", help="numbers of tokens; then nothing else is measured")
    two.add_argument("--limit", type=int)
    three = commands.add_parser("plot")
    three.add_argument("--merge", type=Path, required=True, action="append")
    three.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    if asked.command == "cost":
        cost([float(size) for size in asked.parameters.split(",")], asked.tokens, asked.repeats)
    elif asked.command == "quality":
        measured = Quality(asked.base, asked.adapter, asked.train, asked.test_set, asked.keep, asked.limit)
        if asked.budgets:
            measured.budgets([int(budget) for budget in asked.budgets.split(",")], asked.draws)
        else:
            quality(measured, asked.modes.split(","), asked.draws, asked.rows)
    else:
        plot(asked.merge, asked.output)


if __name__ == "__main__":
    main()
