"""What TRL's SFTTrainer computes: `python benches/trl_eval.py --model DIR --rows FILE --loss completion`.

For an interpreter that has TRL; nothing of lorasmith is imported. Prints one JSON object: the versions, the
loss of `evaluate()` with all rows in one batch (so that it is the mean over tokens), and for each row its
token ids and the positions of the tokens that are learnt.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

LOSSES = {
    "completion": {"completion_only_loss": True},
    "assistant": {"assistant_only_loss": True},
    "all": {"completion_only_loss": False},
}
"""What is learnt → TRL's settings."""


def evaluate(model: str, rows: list[dict[str, Any]], loss: str, template: str | None) -> dict[str, Any]:
    """Run the trainer's evaluation in float32 on the processor."""
    import datasets
    import torch
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    if template is not None:
        tokenizer.chat_template = template
    fields = ("prompt", "completion", "messages", "text")
    given = [{key: row[key] for key in fields if key in row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder,
            per_device_eval_batch_size=len(rows),
            max_length=None,
            packing=False,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            **LOSSES[loss],
        )
        trainer = trl.SFTTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=config,
            train_dataset=datasets.Dataset.from_list(given),
            eval_dataset=datasets.Dataset.from_list(given),
            processing_class=tokenizer,
        )
        found = trainer.evaluate()
        made = []
        for row in trainer.eval_dataset:
            batch = trainer.data_collator([row])
            ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
            made.append({"ids": ids, "scored": [place for place, one in enumerate(labels) if one != -100]})
    return {
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__},
        "loss": found["eval_loss"],
        "rows": made,
    }


def main() -> None:
    """Parse the arguments, print the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--loss", choices=[*LOSSES], required=True)
    parser.add_argument("--template", type=Path)
    asked = parser.parse_args()
    rows = [json.loads(line) for line in asked.rows.read_text().splitlines()]
    template = asked.template.read_text() if asked.template else None
    with redirect_stdout(sys.stderr):  # the trainer prints what it found
        result = evaluate(asked.model, rows, asked.loss, template)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
