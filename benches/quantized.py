"""What merges keep on the grids of quantized bases: `python benches/quantized.py --base DIR --adapter DIR …`.

For each format the 16-bit base is quantized by the format's own library; with `--quantized DIR` that base is
taken as it is. The adapter on the quantized base is the reference. Measured by `lorasmith compare` on the
rows of `--test-set`, token by token:

- *nearest*: rounded to the base's grid, its scales kept;
- *fresh*: merged into 16 bits and quantized anew by the library, as PEFT and axolotl do;
- *calibrated* on disjoint draws of the training rows.

*Recovery* is the share of the adapter's gain in loss over its base that is left. Needs a checkout: the
quantizers are those of the tests. What was measured lies in `--folder`, and is not measured again.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lorasmith
from lorasmith.data.rows import read_examples
from lorasmith.errors import InputError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.jsonl import write_examples
from lorasmith.records.proof import BehaviourProof
from tests.quantized.bases import BITSANDBYTES, save_bitsandbytes, save_case

CASES = {"fp8": "fp8 channel", "nvfp4": "nvfp4", "int4": "int4 groups"}
"""Formats of compressed-tensors, and what the tests call them."""


def quantize(plain: Path, folder: Path, kind: str) -> Path:
    """The 16-bit model in `plain` in a format, by its library."""
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if kind in BITSANDBYTES:
        save_bitsandbytes(partial, plain, **BITSANDBYTES[kind])
        for file in plain.iterdir():
            if file.name.startswith(("tokenizer", "chat_template")):
                shutil.copy(file, partial / file.name)
    else:
        save_case(partial, plain, CASES[kind])
    partial.rename(folder)
    return folder


class Format:
    """The merges of one adapter into one quantized base."""

    def __init__(self, asked: argparse.Namespace, kind: str, base: Path, loss: float) -> None:
        self.asked, self.kind, self.base, self.loss = asked, kind, base, loss

    def line(self, name: str, merged: Path) -> BehaviourProof:
        """Compare a merge with the adapter on the quantized base, and print what is left."""
        place = self.asked.folder / f"{self.kind}-{name}.json"
        try:
            proof = read_record(place, BehaviourProof)
        except InputError:
            proof = lorasmith.compare(
                self.base,
                self.asked.adapter,
                merged,
                self.asked.test_set,
                limit=self.asked.limit,
                states=self.asked.folder / f"{self.kind}-states",
            )
            write_record(place, proof)
        found = proof.overall
        print(
            f"{self.kind:>8} {name:>12} {self.recovery(proof):>9.3f} {found.kl.mean:>9.1e} "
            f"{found.kl.q999:>9.1e} {found.top1_agreement:>8.2%}",
            flush=True,
        )
        return proof

    def recovery(self, proof: BehaviourProof) -> float:
        """(loss of the base − loss of the merge) / (loss of the base − loss of the adapter)."""
        return (self.loss - proof.overall.loss_b) / (self.loss - proof.overall.loss_a)

    def merged(self, name: str, **options: object) -> BehaviourProof:
        """Merge, compare, remove."""
        merged = self.asked.folder / f"{self.kind}-merged"
        if not (self.asked.folder / f"{self.kind}-{name}.json").exists():
            shutil.rmtree(merged, ignore_errors=True)
            lorasmith.merge(self.base, self.asked.adapter, merged, **options)
        proof = self.line(name, merged)
        shutil.rmtree(merged, ignore_errors=True)
        return proof

    def fresh(self) -> BehaviourProof:
        """Merge into 16 bits, quantize that anew by the library, compare."""
        merged, again = self.asked.folder / f"{self.kind}-16bit", self.asked.folder / f"{self.kind}-again"
        if not (self.asked.folder / f"{self.kind}-fresh.json").exists():
            for folder in (merged, again):
                shutil.rmtree(folder, ignore_errors=True)
            lorasmith.merge(self.base, self.asked.adapter, merged, into="16bit")
            quantize(merged, again, self.kind)
        proof = self.line("fresh", again)
        for folder in (merged, again):
            shutil.rmtree(folder, ignore_errors=True)
        return proof


def measure(asked: argparse.Namespace, kind: str) -> None:
    """All merges of one format."""
    base = asked.quantized or quantize(asked.base, asked.folder / f"{kind}-base", kind)
    validation = lorasmith.validate(base, asked.test_set, asked.folder / f"{kind}-loss", limit=asked.limit)
    one = Format(asked, kind, base, validation.overall.loss)
    plain = [one.merged("nearest", into="base", rounding="nearest")]
    if not asked.quantized:
        plain.append(one.fresh())
    examples = read_examples(asked.train)
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    size, found = len(examples) // 5, []
    for draw in range(asked.draws):
        rows = asked.folder / f"draw-{draw}.jsonl"
        write_examples(rows, [examples[place] for place in order[draw * size : (draw + 1) * size]])
        found.append(one.merged(f"draw {draw + 1}", into="base", rounding="calibrated", calibration=rows))
    if found:
        best = min(proof.overall.kl.mean for proof in plain)
        kept, kl = [one.recovery(proof) for proof in found], [proof.overall.kl.mean for proof in found]
        print(
            f"{kind:>8} {'median':>12} {statistics.median(kept):>9.3f} {statistics.median(kl):>9.1e}  "
            f"recovery {min(kept):.3f} to {max(kept):.3f}, KL {min(kl):.1e} to {max(kl):.1e}, "
            f"{best / statistics.median(kl):.0f} × below the better of nearest and fresh",
            flush=True,
        )


def main() -> None:
    """Parse the arguments, measure format by format."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test-set", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--quantized", type=Path)
    parser.add_argument("--formats", nargs="+", default=["nf4", "nvfp4", "int4", "fp8"])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--limit", type=int)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    print(f"{'base':>8} {'merge':>12} {'recovery':>9} {'mean KL':>9} {'99.9 %':>9} {'top-1':>8}", flush=True)
    for kind in asked.formats:
        measure(asked, kind)


if __name__ == "__main__":
    main()
