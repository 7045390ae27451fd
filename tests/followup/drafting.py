"""What the tests of the draft share: responses of a tiny target, and settings that train in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from lorasmith.files.jsonl import write_rows
from lorasmith.followup.drafts.rows import DraftRow, logprobs_beside, read_responses, split_rows
from lorasmith.options import DraftOptions
from tests.tiny import tiny_rows, tiny_tokenizer

SETTINGS = DraftOptions(
    learning_rate=5e-3, epochs=6, batch_size=8, validation=0.15, held_out=0.2, validate_every=6, patience=9
)


K = 8


def write_responses(folder: Path, count: int) -> Path:
    """What the target says, in the shape of `lorasmith respond`; an easy prompt is short, a hard one long."""
    target = AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(1)
    rows, columns = [], []
    for index, row in enumerate(tiny_rows(count, seed=3)):
        easy = index % 2 == 0
        prompt = "the cat" if easy else row["prompt"] + " " + row["prompt"]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        tokens: list[int] = []
        with torch.no_grad():
            for _ in range(10):
                odds = target(torch.tensor([ids + tokens])).logits[0, -1].softmax(-1)
                tokens.append(int(torch.multinomial(odds, 1, generator=generator)))
            logprobs = target(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        top = logprobs.topk(K)
        common = {"id": row["id"], "key": f"key-{index}", "finish_reason": "length"}
        label = {"difficulty": "easy" if easy else "hard"}
        rows.append({**common, "prompt": prompt, "response": tokenizer.decode(tokens), "metadata": label})
        columns.append(
            {
                **common, "prompt": ids, "tokens": tokens,
                "logprobs": [float(logprobs[at, token]) for at, token in enumerate(tokens)],
                "top_tokens": top.indices.tolist(), "top_logprobs": top.values.tolist(),
            }
        )  # fmt: skip
    path = folder / "responses.jsonl"
    write_rows(path, rows)
    pq.write_table(pa.Table.from_pylist(columns), logprobs_beside(path))
    return path


def held_out(place: Path) -> list[DraftRow]:
    rows = read_responses(place / "responses.jsonl", tiny_tokenizer(), max_length=1024)[0]
    return [rows[at] for at in split_rows(60, validation=0.15, held_out=0.2, seed=42).held_out]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lorasmith_draft.json").read_text())  # type: ignore[no-any-return]
