"""Losses beside float64 and lm-eval: `python benches/parity.py --model DIR --test-set FILE`.

The same token ids go to lorasmith, to a padded loop of plain transformers and, where `--lm-eval-python` names
an interpreter that has it, to lm-eval's `HFLM`, all in float32, and row by row without padding to plain
transformers in float64. The table says how far each is from float64: over all scored tokens, and in the
worst row, in nats per token.

With `--trl-python`, an interpreter that has TRL, the same rows go through `SFTTrainer.evaluate()` with
`completion_only_loss`, and through `lorasmith validate --boundary text`: the loss, how far it is from float64
on these tokens, and how many are scored.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from scoring import encode, run


def main() -> None:
    """Parse the arguments, run every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--test-set", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lm-eval-python", default="")
    parser.add_argument("--trl-python", default="")
    parser.add_argument("--arithmetic", default="auto")
    arguments = parser.parse_args()
    requests = encode(arguments)
    counts = [len(ids) - n_prompt for ids, n_prompt in requests]
    print(f"{len(requests)} rows, {sum(counts):,} scored tokens")
    exact = in_float64(arguments, requests)
    print(f"loss in float64: {sum(exact) / sum(counts):.8f}")
    print(f"{'':<10} {'loss':>12} {'Δ of all':>10} {'worst row':>10}")
    for way in ["lorasmith", "naive", *(["lm-eval"] if arguments.lm_eval_python else [])]:
        found = run(way, arguments, requests)["losses"]
        whole = (sum(found) - sum(exact)) / sum(counts)
        worst = max(abs(a - b) / n for a, b, n in zip(found, exact, counts, strict=True))
        print(f"{way:<10} {sum(found) / sum(counts):>12.8f} {whole:>+10.1e} {worst:>10.1e}")
    if arguments.trl_python:
        beside_trl(arguments)


def beside_trl(arguments: argparse.Namespace) -> None:
    """The number that a trainer prints, in both."""
    import lorasmith
    from lorasmith.data.rows import read_examples
    from lorasmith.files.jsonl import write_examples
    from lorasmith.models.load import load_tokenizer
    from lorasmith.models.text import encode_examples

    examples = [row for row in read_examples(arguments.test_set) if not row.is_text][: arguments.rows]
    with tempfile.TemporaryDirectory() as folder:
        given, ours = Path(folder) / "trl.jsonl", Path(folder) / "ours.jsonl"
        write_examples(ours, examples)
        messages = [[turn.message() for turn in row.turns] for row in examples]
        rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in messages]
        given.write_text("".join(json.dumps(row) + "\n" for row in rows))
        child = Path(__file__).with_name("trl_eval.py")
        command = [arguments.trl_python, child, "--model", arguments.model, "--rows", given]
        done = subprocess.run(
            [*command, "--loss", "completion"], check=True, stdout=subprocess.PIPE, text=True
        )
        trl = json.loads(done.stdout.splitlines()[-1])
        found = lorasmith.validate(
            arguments.model, ours, Path(folder) / "out", boundary="text", both_boundaries=False
        )
    encoded = encode_examples(
        examples, load_tokenizer(arguments.model), max_length=1 << 20, boundary="text"
    ).rows
    exact = in_float64(arguments, [[row.ids, row.spans[0][0]] for row in encoded])
    tokens = sum(row.scored for row in encoded)
    loss = sum(exact) / tokens
    print(f"\n--boundary text and TRL {trl['versions']['trl']}; float64: {loss:.8f}, {tokens:,} tokens")
    counts = {"lorasmith": found.overall.tokens, "trl": sum(len(row["scored"]) for row in trl["rows"])}
    for way, value in (("lorasmith", found.overall.loss), ("trl", trl["loss"])):
        print(f"{way:<10} {value:>12.8f} {value - loss:>+10.1e} {counts[way]:>10,}")


def in_float64(arguments: argparse.Namespace, requests: list[list[Any]]) -> list[float]:
    """Summed loss of each row in nats: one row at a time, no mask, all logits."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float64).eval()
    losses = []
    with torch.inference_mode():
        for ids, n_prompt in requests:
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            targets = torch.tensor(ids[n_prompt:])
            losses.append(-float(logprobs[torch.arange(n_prompt - 1, len(ids) - 1), targets].sum()))
    return losses


if __name__ == "__main__":
    main()
