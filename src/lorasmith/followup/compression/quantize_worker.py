"""auto-round in a process of its own: `python -m lorasmith.followup.compression.quantize_worker JOB.json`.

The library starts processes that import the main module again, reads the hub's settings while it is imported
and leaves patches behind in transformers. A process of its own keeps all of that away from ours, and can be
stopped at once. The job names only local files; nothing is fetched.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Quantize as the job says; returns 0, an error is the library's own traceback on standard error."""
    _die_with_parent()
    # Both are read while the libraries are imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    quantize(job)
    return 0


def quantize(job: dict[str, Any]) -> None:
    """`job`: model, output, format, method, bits, group_size, iterations, samples [N, S], seed."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(job["seed"])
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype="auto", local_files_only=True, trust_remote_code=False
    )
    length = max(len(row) for row in job["samples"])
    # Without `disable_opt_rtn`, zero iterations still search a scale for half a minute a block.
    how: dict[str, Any] = (
        {"iters": 0, "disable_opt_rtn": True} if job["method"] == "rtn" else {"iters": job["iterations"]}
    )
    # A GGUF format brings its own bits and groups.
    scheme = (
        {} if job["format"] != "llm_compressor" else {"bits": job["bits"], "group_size": job["group_size"]}
    )
    rounding = AutoRound(
        model,
        tokenizer=tokenizer,
        dataset=[_inputs(row) for row in job["samples"]],
        nsamples=len(job["samples"]),
        seqlen=length,
        batch_size=min(8, len(job["samples"])),
        seed=job["seed"],
        device_map=job["device"],
        # On a processor compiling takes minutes and gives nothing back.
        enable_torch_compile=False,
        **how,
        **scheme,
    )
    rounding.quantize_and_save(job["output"], format=job["format"])


def _inputs(row: list[int]) -> dict[str, Any]:
    """[1, S] tensors. The mask is ours: the library would take end-of-turn tokens for padding."""
    import torch

    ids = torch.tensor([row])
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # a mask of ones only is dropped by some models, and a block's inputs would then differ
    return {"input_ids": ids, "attention_mask": mask}


def _die_with_parent() -> None:
    """Only Linux can; elsewhere a killed command leaves its worker to finish in a folder nobody reads."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
