"""Scoring beside lm-eval and the naive padded loop: `python benches/scoring.py --model DIR --test-set FILE`.

The same token ids go to three processes of their own: lorasmith, lm-eval's `HFLM` in batches of 8, and a
loop over padded batches of 4 with full logits. Each gives the loss of every row, the time of scoring without
loading, and its peak memory. All compute in float32. `--lm-eval-python` names an interpreter that has lm-eval
(and torch, transformers); without it that line is left out. Useful work is two operations for each weight and
real token, plus attention, plus the head at the scored positions; it is set against the best float32 rate of
the machine at the model's own layer shapes. Tokens per second count prompts and responses.

`--growth 50 500 5000` scores so many rows instead, with lorasmith alone; beyond the file's end its rows come
again with their tokens shuffled, so that they share nothing with the first.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAIVE_BATCH, LM_EVAL_BATCH = 4, 8


def main() -> None:
    """Parse the arguments; run as one of the three children or as the parent that prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--test-set", type=Path)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lm-eval-python", default="")
    parser.add_argument("--arithmetic", default="auto")
    parser.add_argument("--growth", type=int, nargs="*", default=[])
    parser.add_argument("--child", default="")
    parser.add_argument("--requests", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
    elif arguments.growth:
        growth(arguments)
    else:
        parent(arguments)


def child(arguments: argparse.Namespace) -> None:
    """Score the requests in one way and print the result as JSON."""
    import torch

    torch.set_num_threads(arguments.threads)
    requests = json.loads(arguments.requests.read_text())
    ways = {"lorasmith": by_lorasmith, "lm-eval": by_lm_eval, "naive": by_loop, "gemm": gemm_rate}
    print(json.dumps(ways[arguments.child](arguments, requests)))


class Stopwatch:
    """Wall and processor time since it was made; the latter is what counts on a machine with other work."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def result(self, losses: list[float], **more: Any) -> dict[str, Any]:
        """What a child reports: summed losses in nats by row, seconds, peak resident bytes."""
        wall, processor = time.perf_counter() - self.wall, time.process_time() - self.processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"losses": losses, "seconds": wall, "processor": processor, "peak": peak, **more}


def by_lorasmith(arguments: argparse.Namespace, requests: list[list[Any]]) -> dict[str, Any]:
    """The product's own path, from token ids to log-probabilities."""
    import torch

    from lorasmith.models.batches import BATCH_TOKENS
    from lorasmith.models.device import choose_route
    from lorasmith.models.layout import choose_layout, lay_out, plan_rows
    from lorasmith.models.load import load_model
    from lorasmith.models.scoring import open_forward, row_loss, score_states
    from lorasmith.models.text import Encoded

    route = choose_route(arguments.arithmetic, torch.device("cpu"))
    loaded = load_model(arguments.model)
    rows = [Encoded.behind(ids, n_prompt) for ids, n_prompt in requests]
    names = [str(index) for index in range(len(rows))]
    losses = [0.0] * len(rows)
    watch = Stopwatch()
    layout = choose_layout(loaded, rows, route)[0]
    computed = 0
    with open_forward(loaded, rows, route) as forward:
        for rows_together in plan_rows(rows, layout, BATCH_TOKENS):
            batch = lay_out(rows_together, rows, layout)
            computed += batch.ids.numel()
            for row, values in zip(rows_together, score_states(forward, batch, names)[0], strict=True):
                losses[row] = row_loss(values)
    return watch.result(losses, route=route.label, computed=computed)


def by_lm_eval(arguments: argparse.Namespace, requests: list[list[Any]]) -> dict[str, Any]:
    """lm-eval's own batching of log-likelihood requests."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(arguments.model), batch_size=LM_EVAL_BATCH, device="cpu", dtype="float32")
    asked = [(("", ""), ids[:n_prompt], ids[n_prompt:]) for ids, n_prompt in requests]
    watch = Stopwatch()
    answers = model._loglikelihood_tokens(asked, disable_tqdm=True)
    return watch.result([-answer[0] for answer in answers])


def by_loop(arguments: argparse.Namespace, requests: list[list[Any]]) -> dict[str, Any]:
    """Batches of 4 in file order, padded with a mask, all logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    losses = []
    watch = Stopwatch()
    with torch.inference_mode():
        for first in range(0, len(requests), NAIVE_BATCH):
            batch = requests[first : first + NAIVE_BATCH]
            width = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
            logprobs = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits.float(), -1)
            for place, (row, n_prompt) in enumerate(batch):
                targets = torch.tensor(row[n_prompt:])
                at = torch.arange(n_prompt - 1, len(row) - 1)
                losses.append(-float(logprobs[place, at, targets].double().sum()))
    return watch.result(losses)


def gemm_rate(arguments: argparse.Namespace, requests: list[list[Any]]) -> dict[str, Any]:
    """Operations of the useful work, and per second in its products by the best float32 route there is."""
    import torch
    from transformers import AutoModelForCausalLM

    from lorasmith.models.device import float32_routes, use_route

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    head = model.get_output_embeddings().weight
    layers = [
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.weight is not head
    ]
    lengths = [len(ids) for ids, _ in requests]
    scored = sum(len(ids) - n_prompt for ids, n_prompt in requests)
    weights = sum(weight.numel() for weight in layers)
    config = model.config
    attention = 2 * config.num_hidden_layers * config.hidden_size * sum(length**2 for length in lengths)
    useful = 2 * weights * sum(lengths) + attention + 2 * head.numel() * scored
    best = 0.0
    for route in float32_routes(torch.device("cpu")):
        with use_route(route):
            seconds = {shape: time_product(shape) for shape in {tuple(weight.shape) for weight in layers}}
        total = sum(seconds[tuple(weight.shape)] for weight in layers)
        best = max(best, 2 * 4096 * weights / total)
    return {"useful": useful, "rate": best}


def time_product(shape: tuple[int, ...], rows: int = 4096, repeats: int = 5) -> float:
    """Best seconds of one [rows, in] by [out, in] product."""
    import torch

    left, right = torch.randn(rows, shape[1]), torch.randn(*shape)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        best = min(best, time.perf_counter() - start)
    return best


def run(way: str, arguments: argparse.Namespace, requests: list[list[Any]]) -> dict[str, Any]:
    """One child, in a process of its own."""
    python = arguments.lm_eval_python if way == "lm-eval" else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requests.json"
        file.write_text(json.dumps(requests))
        command = [python, __file__, "--child", way, "--requests", str(file), "--model", str(arguments.model)]
        command += ["--threads", str(arguments.threads), "--arithmetic", arguments.arithmetic]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def encode(arguments: argparse.Namespace) -> list[list[Any]]:
    """Token ids and prompt length of each row."""
    from lorasmith.data.rows import read_examples
    from lorasmith.models.load import load_tokenizer
    from lorasmith.models.text import encode_examples

    examples = read_examples(arguments.test_set)
    random.Random(0).shuffle(examples)  # the sources mixed, so that the naive loop meets mixed batches
    examples = examples[: arguments.rows]
    rows = encode_examples(examples, load_tokenizer(arguments.model), max_length=8192).rows
    return [[row.ids, row.n_prompt] for row in rows]


def again(requests: list[list[Any]], index: int) -> list[Any]:
    """Row `index` of the file repeated without end: the same lengths, other tokens."""
    ids, n_prompt = requests[index % len(requests)]
    if index < len(requests):
        return [ids, n_prompt]
    return [random.Random(index).sample(ids, len(ids)), n_prompt]


def line(
    one: dict[str, Any], ours: dict[str, Any], work: dict[str, Any], requests: list[list[Any]], peak: str
) -> str:
    """Rates, their ratio to ours (below 1 is slower), and how far the losses are from ours."""
    tokens = sum(len(ids) for ids, _ in requests)
    counts = [len(ids) - n_prompt for ids, n_prompt in requests]
    rows = [abs(a - b) / n for a, b, n in zip(one["losses"], ours["losses"], counts, strict=True)]
    whole = abs(sum(one["losses"]) - sum(ours["losses"])) / sum(counts)
    rate = work["useful"] / one["seconds"]
    return (
        f"{tokens / one['seconds']:>7.0f} {ours['seconds'] / one['seconds']:>6.2f}× "
        f"{tokens / one['processor']:>10.0f} {ours['processor'] / one['processor']:>6.2f}× {peak:>9} "
        f"{rate / 1e9:>4.0f} G/s {100 * rate / work['rate']:>6.0f} % {whole:>9.1e} {max(rows):>9.1e}"
    )


def growth(arguments: argparse.Namespace) -> None:
    """Score more and more rows and print a line each."""
    from lorasmith.machine.resources import human_bytes

    requests = encode(arguments)
    for count in arguments.growth:
        rows = [again(requests, index) for index in range(count)]
        tokens, one = sum(len(ids) for ids, _ in rows), run("lorasmith", arguments, rows)
        rates = [number / one["seconds"] for number in (tokens, one["computed"])]
        print(
            f"{count:>6} rows, {tokens:>9,} tokens: {rates[0]:.0f} tok/s, {rates[1]:.0f} computed, "
            f"peak {human_bytes(one['peak'])}",
            flush=True,
        )


def parent(arguments: argparse.Namespace) -> None:
    """Run every way and print the table."""
    from lorasmith.machine.resources import human_bytes

    requests = encode(arguments)
    tokens = sum(len(ids) for ids, _ in requests)
    scored = sum(len(ids) - n_prompt for ids, n_prompt in requests)
    print(f"{len(requests)} rows, {tokens:,} tokens, {scored:,} of them scored, {arguments.threads} threads")
    work = run("gemm", arguments, requests)
    ways = ["lorasmith", "lm-eval", "naive"] if arguments.lm_eval_python else ["lorasmith", "naive"]
    found = {way: run(way, arguments, requests) for way in ways}
    ours = found["lorasmith"]
    print(
        f"float32 products at the layers' shapes: {work['rate'] / 1e9:.0f} GFLOP/s; route: {ours['route']}; "
        f"tokens that lorasmith computed: {ours['computed']:,}"
    )
    print(
        f"{'':<10} {'tok/s':>7} {'ratio':>7} {'tok/cpu-s':>10} {'ratio':>7} {'peak':>9} {'useful':>8} "
        f"{'of best':>8} {'loss Δ':>9} {'row Δ':>9}"
    )
    for way, one in found.items():
        print(f"{way:<10} {line(one, ours, work, requests, human_bytes(one['peak']))}")


if __name__ == "__main__":
    main()
