"""A draft on disk: a plain transformers folder, the small head beside it, and the record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorasmith.files.atomic import aside, publish_folder, write_bytes, write_record
from lorasmith.files.digests import describe, folder_files
from lorasmith.followup.draft_base import Draft
from lorasmith.models.load import quiet_libraries
from lorasmith.records.draft import DraftRecord

RECORD = "lorasmith_draft.json"
HEAD = "difficulty_head"
"""`difficulty_head.safetensors` holds `weight` [C, H] and `bias` [C]; `difficulty_head.json` says how to use
them: softmax(weight · h + bias), h being the final hidden state at the last token of the prompt."""


def round_to_saved(draft: Draft, head: torch.nn.Linear | None) -> None:
    """Round the weights to the type that they are saved in, so that the report is on what is saved."""
    dtype = getattr(draft.model.config, "dtype", None)
    saved = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    draft.model.to(saved).to(torch.float32)
    draft.model.config.dtype = saved


def save_draft(
    draft: Draft, head: torch.nn.Linear | None, labels: Sequence[str], record: DraftRecord, output: Path
) -> DraftRecord:
    """Write the folder aside and rename it; returns the record with the files' digests."""
    temporary = aside(output)
    shutil.rmtree(temporary, ignore_errors=True)
    with quiet_libraries():
        draft.model.to(draft.model.config.dtype).save_pretrained(temporary)
        draft.tokenizer.save_pretrained(temporary)
    if head is not None:
        tensors = {"weight": head.weight.detach().cpu(), "bias": head.bias.detach().cpu()}
        save_file(tensors, temporary / f"{HEAD}.safetensors")
        write_bytes(temporary / f"{HEAD}.json", _head_config(labels, tensors["weight"]))
    files = describe(folder_files(temporary), temporary)
    record = record.model_copy(update={"files": files})
    write_record(temporary / RECORD, record)
    publish_folder(temporary, output)
    return record


def _head_config(labels: Sequence[str], weight: torch.Tensor) -> bytes:
    body: dict[str, Any] = {
        "format": "lorasmith/difficulty-head/1",
        "labels": list(labels),
        "hidden_size": weight.shape[1],
        "input": "final hidden state (what the output head gets) at the last token of the prompt",
        "output": "softmax(weight @ h + bias), in the order of labels",
    }
    return (json.dumps(body, indent=2) + "\n").encode()
