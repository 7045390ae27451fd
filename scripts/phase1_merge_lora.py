#!/usr/bin/env python3
"""The guide's manual step 3 by its own name: merge the adapter into its base, as a model of its own.

The base is the one that adapter_config.json names, a folder or org/name on the Hugging Face hub, unless
--base_model names another. --verify recomputes every element of the merged model independently (the guide
compared a sample), writes the proof beside the merged folder, and exits 1 when the weights are not the merge.
See `lorasmith merge` and `lorasmith prove`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lorasmith.cli.main import guarded
from lorasmith.errors import ExitCode


def main() -> int:
    """Returns 0, 1 when the merged model is not what base and adapter give, or the exit code of an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lora_path", type=Path, required=True, help="the adapter")
    parser.add_argument("--output_path", type=Path, required=True, help="folder for the merged model")
    parser.add_argument("--base_model", help="its folder, or org/name[@revision] on the hub")
    parser.add_argument("--precision", help="bfloat16, float16, float32 or base (as it is)")
    parser.add_argument("--rounding", help="as `lorasmith merge --rounding`")
    parser.add_argument("--verify", action="store_true", help="prove every element of the result")
    asked = parser.parse_args()
    return guarded(lambda: merge_adapter(asked))


def merge_adapter(asked: argparse.Namespace) -> int:
    """Merge, and prove the result if that is asked for."""
    import lorasmith
    from lorasmith.cli.console import bar, console
    from lorasmith.cli.views import proofs
    from lorasmith.hub.models import base_of, local_model

    adapter, output = asked.lora_path, asked.output_path
    named = asked.base_model or base_of(adapter, flag="--base_model")
    base = local_model(named, [adapter], progress=bar)
    print(f"Merging LoRA adapter into base model {named} ...")
    options = {name: vars(asked)[name] for name in ("precision", "rounding") if vars(asked)[name]}
    proofs.show_merge(lorasmith.merge(base, adapter, output, progress=bar, **options), console())
    print(f"✓ Merge complete: {output}")
    if not asked.verify:
        return ExitCode.OK
    record = output.with_name(f"{output.name}_weights_proof.json")
    proof = lorasmith.prove(base, adapter, output, output=record, progress=bar)
    proofs.show_weights(proof, console())
    if proof.grade == "different":
        print("✗ Verification failed: these are not the weights of this merge")
        return ExitCode.ANSWER_IS_NO
    print(f"✓ Verification passed ({proof.grade}): {record}")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
