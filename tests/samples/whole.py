"""A whole run folder: the parts, gates, times and what was asked."""

from __future__ import annotations

from pathlib import Path

from lorasmith.data.rows import read_examples
from lorasmith.files.atomic import write_record
from lorasmith.records.dataset import Example
from lorasmith.records.release import Gate, GateRecord, GateResult, RunRecord, StageTiming, TimingRecord
from tests.samples.merge import write_merged
from tests.samples.proofs import write_proof
from tests.samples.rows import sample_examples, sha, write_test_set
from tests.samples.validations import token_losses, write_validation


def write_gates(run: Path) -> None:
    """Two gates that pass, one that fails, one without data."""
    retrain = "train again with more regularisation"
    results = [
        (Gate(name="loss", metric="adapter.loss", threshold=0.10, advice=retrain), 0.0734, "pass", ""),
        (
            Gate(name="perplexity", metric="adapter.perplexity", threshold=2.0, advice=retrain),
            1.0762,
            "pass",
            "",
        ),
        (
            Gate(
                name="merge loss Δ",
                metric="merge.loss_delta",
                threshold=1e-4,
                advice="merge again at higher precision or with another rounding",
            ),
            1.53e-3,
            "fail",
            "",
        ),
        (
            Gate(name="hard perplexity", metric="adapter.perplexity", group="difficulty=hard", threshold=3.0),
            None,
            "not measured",
            "no example in difficulty=hard",
        ),
    ]
    write_record(
        run / "gates.json",
        GateRecord(
            passed=False,
            gates=[
                GateResult(gate=gate, measured=measured, verdict=verdict, reason=reason)
                for gate, measured, verdict, reason in results
            ],
        ),
    )


def write_timing(run: Path) -> None:
    """`timing.json` of a small run."""
    seconds = {"testset": 0.4, "validate-base": 63.2, "validate-adapter": 81.0, "merge": 9.3, "prove": 14.8}
    write_record(
        run / "timing.json",
        TimingRecord(
            hardware={"processor": "ACME-9000", "cores": 2, "memory_bytes": 24 << 30, "system": "Linux 6.1"},
            stages=[
                StageTiming(
                    stage=stage,
                    wall_seconds=wall,
                    cpu_seconds=wall * 1.8,
                    peak_rss_bytes=900_000_000 + int(wall * 1e7),
                    started="2026-11-22T10:00:00+00:00",
                )
                for stage, wall in seconds.items()
            ],
        ),
    )


def sample_run(run: Path, *, count: int = 40, seed: int = 0, rows: list[Example] | None = None) -> Path:
    """A whole run folder."""
    rows = sample_examples(count, seed=seed) if rows is None else rows
    run.mkdir(parents=True, exist_ok=True)
    test_set = write_test_set(run, rows)
    examples = read_examples(run / "testset" / "test_set.jsonl")
    losses = token_losses(examples, seed=seed)
    write_validation(run, examples, test_set, losses)
    write_merged(run)
    write_proof(run, examples, test_set, losses)
    write_gates(run)
    write_timing(run)
    write_record(
        run / "run.json",
        RunRecord(
            config={"precision": "base", "rounding": "nearest", "seed": 42, "template": "auto"},
            versions={"lorasmith": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
            inputs={"base": sha("base"), "adapter": sha("adapter"), "test_set": test_set.sha256},
        ),
    )
    return run
