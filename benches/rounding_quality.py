"""What each rounding keeps: merge, compare with the adapter on unseen rows, write the figures down, next."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import lorasmith
from lorasmith.data.rows import read_examples
from lorasmith.errors import InputError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.files.digests import digest_folder, sha256_file
from lorasmith.files.jsonl import write_examples
from lorasmith.merging.merge import REVISION
from lorasmith.records.merging import MergeRecord
from lorasmith.records.proof import BehaviourProof, TokenComparison

PLAIN: dict[str, dict[str, Any]] = {
    "nearest": {},
    "dithered": {"rounding": "dithered"},
    "float16": {"precision": "float16"},
}
"""Modes without rows, and what `merge` is told for them."""


@dataclass
class Quality:
    """One adapter on one test set; what has been measured lies in `folder`, and is not measured again."""

    base: Path
    adapter: Path
    train: Path
    test_set: Path
    folder: Path
    limit: int | None = None
    _inputs: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        digests = [digest_folder(folder) for folder in (self.base, self.adapter)]
        self._inputs = [REVISION, *digests, sha256_file(self.test_set), self.limit]
        header = f"{'mode':>30} {'loss Δ':>9} {'95 %':>20}"
        print(f"{header} {'mean KL':>9} {'99.9 %':>9} {'max':>9} {'same token':>10}", flush=True)

    def measure(self, title: str, rows: Path | None = None, **options: Any) -> BehaviourProof:
        """Merge with `options`, calibrated where there are `rows`, and compare on the test set."""
        if rows is not None:
            options |= {"rounding": "calibrated", "calibration": rows}
        told = {name: str(value) for name, value in options.items() if name != "calibration"}
        key = [*self._inputs, told, None if rows is None else sha256_file(rows)]
        place = self.folder / (hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16] + ".json")
        try:
            proof = read_record(place, BehaviourProof)
        except InputError:
            proof = self._compare(title, place, options)
        _line(title, proof.overall)
        return proof

    def _compare(self, title: str, place: Path, options: dict[str, Any]) -> BehaviourProof:
        merged = self.folder / "merged"
        # Of a run that was stopped.
        shutil.rmtree(merged, ignore_errors=True)
        record = lorasmith.merge(self.base, self.adapter, merged, test_set=self.test_set, **options)
        states = self.folder / "states"
        proof = lorasmith.compare(
            self.base, self.adapter, merged, self.test_set, limit=self.limit, states=states
        )
        write_record(place, proof)
        with (self.folder / "log.jsonl").open("a") as handle:
            handle.write(json.dumps({"title": title, "file": place.name, **_update(record)}) + "\n")
        shutil.rmtree(merged)
        return proof

    def plain(self, modes: Sequence[str]) -> dict[str, BehaviourProof]:
        """The modes that need no rows."""
        return {mode: self.measure(mode, **PLAIN[mode]) for mode in modes}

    def draws(self, count: int, each: int | None = None) -> list[BehaviourProof]:
        """Calibrated on disjoint draws of training rows: `each` rows, or all there are in `count` parts."""
        examples = read_examples(self.train)
        order = np.random.default_rng(0).permutation(len(examples)).tolist()
        size = each or len(examples) // count
        found = []
        for draw in range(count):
            rows = self.folder / f"draw-{draw}.jsonl"
            write_examples(rows, [examples[place] for place in order[draw * size : (draw + 1) * size]])
            found.append(self.measure(f"calibrated, {size} rows, draw {draw + 1}", rows))
        return found

    def budgets(self, tokens: Sequence[int], seeds: int) -> None:
        """Calibrated on so many tokens of the training rows, drawn by each seed; the draws may overlap."""
        for budget in tokens:
            found = [
                self.measure(
                    f"{budget:,} tokens, seed {seed}", self.train, calibration_tokens=budget, seed=seed
                )
                for seed in range(seeds)
            ]
            deltas = [one.overall.loss_delta for one in found]
            means = [one.overall.kl.mean for one in found]
            print(f"{budget:>30,} mean loss Δ {statistics.fmean(deltas):+.1e}", end=" ")
            print(f"{sum(abs(delta) < 1e-4 for delta in deltas)} of {seeds} below 1e-4;", end=" ")
            print(f"median KL {statistics.median(means):.1e}", flush=True)


def show_medians(plain: BehaviourProof, found: Sequence[BehaviourProof]) -> None:
    """Over the draws, against nearest."""
    kl = plain.overall.kl
    mean, tail = (
        statistics.median(getattr(one.overall.kl, part) for one in found) for part in ("mean", "q999")
    )
    print(f"medians: mean KL {mean:.1e}, {kl.mean / mean:.1f} × below nearest;", end=" ")
    print(f"99.9 % quantile {tail:.1e}, {kl.q999 / tail:.1f} × below", flush=True)


def show_sources(found: dict[str, BehaviourProof]) -> None:
    """Mean KL and its 99.9 % quantile in each source of the test set, one column a mode."""
    print(f"{'':>30}" + "".join(f" {name:>19}" for name in found))
    for source in next(iter(found.values())).groups.get("source", {}):
        groups = [proof.groups["source"][source] for proof in found.values()]
        cells = "".join(f" {group.kl.mean:>9.1e} {group.kl.q999:>9.1e}" for group in groups)
        print(f"{source:>20} {groups[0].tokens:>9,}{cells}", flush=True)


def _line(name: str, found: TokenComparison) -> None:
    delta, kl, interval = found.loss_delta, found.kl, found.loss_delta_interval
    ends = "" if interval is None else f"{interval.low:+.1e} … {interval.high:+.1e}"
    numbers = f"{kl.mean:>9.1e} {kl.q999:>9.1e} {kl.max:>9.1e} {found.top1_agreement:>10.2%}"
    print(f"{name:>30} {delta:>+9.1e} {ends:>20} {numbers}", flush=True)


def _update(record: MergeRecord) -> dict[str, float]:
    sizes = [tensor.relative_update for tensor in record.tensors if tensor.relative_update]
    return {"swallowed": record.swallowed_fraction, "relative_update": statistics.median(sizes)}
