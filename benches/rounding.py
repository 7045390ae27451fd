"""What the roundings cost, and what they keep.

    python benches/rounding.py cost --parameters 5e7,2e8,1e9
    python benches/rounding.py quality --base BASE --adapter ADAPTER --train train.jsonl --test-set test.jsonl
    python benches/rounding.py plot --merge MERGED --output docs/images/swallowed.svg

`cost`: seconds and peak memory of a merge in each mode, on random Llama models, each in a process of its own.
`quality`: every mode against the adapter on unseen rows; calibrated rounding over disjoint draws of the
training rows, medians, and each source on its own. `plot`: what rounding to nearest swallowed in each tensor,
from merges' own records.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from merge import make_inputs  # beside this file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lorasmith
from lorasmith.files.atomic import read_record
from lorasmith.files.jsonl import read_examples, write_examples
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, TokenComparison

MODES = ("nearest", "dithered", "calibrated")
DRAWS = 5
WORDS = 32_000
"""Of the random models' vocabulary."""

CHILD = """
import json, sys, time
from pathlib import Path
import torch
from lorasmith.files.machine import peak_memory
from lorasmith.merging.execute import merge
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


def quality(base: Path, adapter: Path, train: Path, test_set: Path, draws: int, limit: int | None) -> None:
    """One line per mode, and for calibrated rounding the medians over disjoint draws of rows.

    Also the mean KL in each source of the test set, nearest beside calibrated on all rows.
    """
    examples = read_examples(train)
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    each = len(examples) // draws
    print(
        f"{'mode':>24} {'loss Δ':>9} {'95 %':>20} {'mean KL':>9} {'99.9 %':>9} {'max':>9} {'same token':>10}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def measure(title: str, **options: Any) -> BehaviourProof:
            merged = folder / "merged"
            lorasmith.merge(base, adapter, merged, test_set=test_set, **options)
            proof = lorasmith.compare(base, adapter, merged, test_set, limit=limit, states=folder / "states")
            _line(title, proof.overall)
            shutil.rmtree(merged)
            return proof

        plain = measure("nearest")
        measure("dithered", rounding="dithered")
        measure("float16", precision="float16")
        found = []
        for draw in range(draws):
            rows = folder / f"draw-{draw}.jsonl"
            write_examples(rows, [examples[place] for place in order[draw * each : (draw + 1) * each]])
            found.append(measure(f"calibrated, {each} rows, {draw}", rounding="calibrated", calibration=rows))
        every = measure(f"calibrated, {len(examples)} rows", rounding="calibrated", calibration=train)
    kl = plain.overall.kl
    mean, tail = (
        statistics.median(getattr(one.overall.kl, part) for one in found) for part in ("mean", "q999")
    )
    print(f"medians: mean KL {mean:.1e}, {kl.mean / mean:.1f} × below nearest;", end=" ")
    print(f"99.9 % quantile {tail:.1e}, {kl.q999 / tail:.1f} × below")
    for source, group in plain.groups.get("source", {}).items():
        print(
            f"{source:>24} mean KL {group.kl.mean:.1e} nearest, {every.groups['source'][source].kl.mean:.1e}"
        )


def _line(name: str, found: TokenComparison) -> None:
    delta, kl, interval = found.loss_delta, found.kl, found.loss_delta_interval
    ends = "" if interval is None else f"{interval.low:+.1e} … {interval.high:+.1e}"
    numbers = f"{kl.mean:>9.1e} {kl.q999:>9.1e} {kl.max:>9.1e} {found.top1_agreement:>10.2%}"
    print(f"{name:>24} {delta:>+9.1e} {ends:>20} {numbers}", flush=True)


def plot(merges: Sequence[Path], output: Path) -> None:
    """Share of updated elements that kept the base's value over ‖ΔW‖/‖W‖, one point a tensor, as SVG."""
    points = [
        (one.relative_update, one.swallowed / (one.swallowed + one.changed), one.name.split(".")[-2])
        for merge in merges
        for one in read_record(merge / "lorasmith_merge.json", MergeRecord).tensors
        if one.relative_update and one.swallowed + one.changed
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(_svg(points))


_COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#c2185b", "#7b5ea7", "#8c564b", "#5f6368")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 420, 64, 56, 20, 140


def _svg(points: list[tuple[float, float, str]]) -> str:
    low = math.floor(math.log10(min(x for x, *_ in points)) * 4) / 4
    high = math.ceil(math.log10(max(x for x, *_ in points)) * 4) / 4

    def across(x: float) -> float:
        return _LEFT + (math.log10(x) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - y * (_HEIGHT - _BOTTOM - _TOP)

    kinds = sorted({kind for *_, kind in points})
    colour = dict(zip(kinds, _COLOURS * len(kinds), strict=False))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    parts.append('<rect width="100%" height="100%" fill="#fff"/>')
    right = _WIDTH - _RIGHT
    for tenth in range(0, 11, 2):
        y = up(tenth / 10)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tenth * 10} %</text>')
    for exponent in range(math.ceil(low * 4), math.floor(high * 4) + 1):
        x = across(10 ** (exponent / 4))
        base = _HEIGHT - _BOTTOM
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}" stroke="#333"/>')
        label = f"{10 ** (exponent / 4):.1e}"
        parts.append(f'<text x="{x:.1f}" y="{base + 20}" text-anchor="middle">{label}</text>')
    for x_value, y_value, kind in points:
        place = f'cx="{across(x_value):.1f}" cy="{up(y_value):.1f}"'
        parts.append(f'<circle {place} r="3" fill="{colour[kind]}" fill-opacity="0.7"/>')
    for number, kind in enumerate(kinds):
        y = _TOP + 14 + 20 * number
        parts.append(f'<circle cx="{right + 20}" cy="{y - 4}" r="4" fill="{colour[kind]}"/>')
        parts.append(f'<text x="{right + 30}" y="{y}">{kind}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">‖ΔW‖ / ‖W‖</text>')
    parts.append(
        f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        "updates swallowed by rounding to nearest</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


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
    for name in ("base", "adapter", "train", "test-set"):
        two.add_argument(f"--{name}", type=Path, required=True)
    two.add_argument("--draws", type=int, default=DRAWS)
    two.add_argument("--limit", type=int)
    three = commands.add_parser("plot")
    three.add_argument("--merge", type=Path, required=True, action="append")
    three.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    if asked.command == "cost":
        cost([float(size) for size in asked.parameters.split(",")], asked.tokens, asked.repeats)
    elif asked.command == "quality":
        quality(asked.base, asked.adapter, asked.train, asked.test_set, asked.draws, asked.limit)
    else:
        plot(asked.merge, asked.output)


if __name__ == "__main__":
    main()
