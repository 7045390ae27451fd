#!/usr/bin/env python3
"""The guide's manual steps 2 and 4 by their own name: validate adapter and merged model, and compare them.

Writes lora_validation.json into --output_dir, and unless --skip_merged is given merged_validation.json,
comparison.json, behaviour.json and weights.json. The merged model is expected in `merged` beside the adapter,
the base where adapter_config.json says (a folder, or org/name on the Hugging Face hub), unless --merged_path
and --base_path name them. Exits 1 when the merged model misses the guide's criteria (loss Δ below 1e-4,
perplexity Δ below 0.01) or is not what base and adapter give. See `lorasmith validate`, `lorasmith compare`
and `lorasmith prove`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from lorasmith.cli.main import guarded
from lorasmith.errors import ExitCode, os_errors

LOSS_DELTA, PERPLEXITY_DELTA = 1e-4, 0.01
STATES = ".states"
"""Below --output_dir while it runs: what the validations leave for the comparison."""


def main() -> int:
    """Returns 0, 1 when the merged model is not good enough, or the exit code of an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_path", type=Path, required=True, help="the adapter")
    parser.add_argument("--test_file", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--skip_merged", action="store_true")
    parser.add_argument("--batch_size", type=int, help="rows of a batch at most")
    parser.add_argument("--base_path", type=Path)
    parser.add_argument("--merged_path", type=Path)
    parser.add_argument("--device")
    asked = parser.parse_args()
    return guarded(lambda: validate_models(asked))


def validate_models(asked: argparse.Namespace) -> int:
    """Validate the adapter, and the merged model unless it is to be skipped."""
    import lorasmith
    from lorasmith.cli.console import bar
    from lorasmith.hub.models import base_of, local_model

    adapter, output = asked.model_path, asked.output_dir
    named = asked.base_path or base_of(adapter, flag="--base_path")
    base = local_model(named, [adapter], progress=bar)
    options: dict[str, Any] = {"batch_size": asked.batch_size, "progress": bar}
    if asked.device:
        options["device"] = asked.device
    if not asked.skip_merged:
        options["states"] = output / STATES
    lora = lorasmith.validate(base, asked.test_file, output, adapter=adapter, **options)
    keep(output / "adapter.json", output / "lora_validation.json")
    show("LoRA Model", lora.overall.loss, lora.overall.perplexity, lora.overall.examples)
    if asked.skip_merged:
        return ExitCode.OK
    merged = asked.merged_path or adapter.parent / "merged"
    result = lorasmith.validate(merged, asked.test_file, output, role="merged", **options)
    keep(output / "merged.json", output / "merged_validation.json")
    show("Merged Model", result.overall.loss, result.overall.perplexity, result.overall.examples)
    return compare_models(asked, base, merged, options)


def compare_models(asked: argparse.Namespace, base: Path, merged: Path, options: dict[str, Any]) -> int:
    """Prove the weights, compare the behaviour, write and print the comparison."""
    import lorasmith
    from lorasmith.files.atomic import write_record
    from lorasmith.records.proof import ComparisonRecord
    from lorasmith.scoring.paired import paired_effects

    adapter, output = asked.model_path, asked.output_dir
    weights = lorasmith.prove(base, adapter, merged, output=output / "weights.json")
    behaviour = lorasmith.compare(
        base, adapter, merged, asked.test_file, output / "behaviour.json", **options
    )
    shutil.rmtree(output / STATES, ignore_errors=True)
    effect, _ = paired_effects(output / "adapter.parquet", output / "merged.parquet")
    record = ComparisonRecord(
        adapter_effect=None,
        merge_effect=effect,
        weights_grade=weights.grade,
        behaviour_grade=behaviour.grade,
    )
    write_record(output / "comparison.json", record)
    print("Comparison:")
    print(f"  Loss Δ:     {effect.loss_delta:+.8f}")
    print(f"  PPL Δ:      {effect.perplexity_delta:+.6f}")
    print(f"  Weights:    {weights.grade}")
    print(f"  Behaviour:  {behaviour.grade}")
    good = (
        abs(effect.loss_delta) < LOSS_DELTA
        and abs(effect.perplexity_delta) < PERPLEXITY_DELTA
        and weights.grade != "different"
        and behaviour.grade != "drifted"
    )
    return ExitCode.OK if good else ExitCode.ANSWER_IS_NO


def keep(written: Path, guide_name: Path) -> None:
    """The same record under the guide's own name."""
    with os_errors(guide_name, "write"):
        shutil.copyfile(written, guide_name)


def show(title: str, loss: float, perplexity: float, examples: int) -> None:
    """The lines of the guide's summary."""
    print(f"{title}:\n  Loss:       {loss:.6f}\n  Perplexity: {perplexity:.4f}\n  Examples:   {examples}")


if __name__ == "__main__":
    sys.exit(main())
