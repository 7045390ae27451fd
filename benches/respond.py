"""Responses beside the plain padded loop: `python benches/respond.py --model DIR [--data FILE]`.

Both answer the same rows greedily in float32 with the same number of rows at once and the same limit: the
loop takes batches in file order, pads on the left and calls `generate`; lorasmith sorts and lets a finished
row make room at once. Each runs in a process of its own, by turns; seconds without loading, wall and
processor. Texts are compared token by token. `--reference` adds transformers' own continuous batching
(`generate_batch`).

Without --data the rows are questions that a word answers and tasks that take a page, in a shuffled order, as
in a training file of several domains, with prompts so short that they weigh little.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = ("France", "Japan", "Egypt", "Peru", "Norway", "Kenya", "Canada", "India")
"""Of which the capital is asked for."""
THINGS = (
    "a lighthouse",
    "an old clock",
    "a river",
    "the first snow",
    "a lost dog",
    "a market",
    "a train",
    "bees",
)
"""Of which a story is told."""


def mixed_rows(count: int) -> list[dict[str, str]]:
    """Three short questions for each long task, shuffled by a fixed seed."""
    short = [f"What is the capital of {word}? Answer with the name alone." for word in WORDS]
    short += [f"Is {number} an even number? Say yes or no." for number in range(17, 33)]
    long = [f"Write a story about {thing}, in many sentences." for thing in THINGS]
    long += [f"Explain step by step how one would describe {thing} to a child." for thing in THINGS]
    rows = [long[at // 4 % len(long)] if at % 4 == 3 else short[at % len(short)] for at in range(count)]
    random.Random(1).shuffle(rows)
    return [{"prompt": row} for row in rows]


def main() -> None:
    """Run as one of the children, or as the parent that prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="JSONL with prompts")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--child", default="")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
    else:
        parent(arguments)


def child(arguments: argparse.Namespace) -> None:
    """Answer the rows in one way; print tokens and seconds as JSON."""
    import torch

    from lorasmith.followup.responses.rows import read_prompts
    from lorasmith.models.generation.generate import stop_tokens
    from lorasmith.models.load import load_model
    from lorasmith.models.text import conversation_tokens, frame

    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model)
    around = frame(loaded.tokenizer, "auto", end_of_turn=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in mixed_rows(arguments.rows)))
        rows = read_prompts(arguments.data or file, arguments.rows)
    prompts = [conversation_tokens(loaded.tokenizer, row.messages, around) for row in rows]
    stop = stop_tokens(loaded, around.template)
    ways = {"loop": by_loop, "lorasmith": by_lorasmith, "generate_batch": by_generate_batch}
    wall, processor = time.perf_counter(), time.process_time()
    tokens = ways[arguments.child](arguments, loaded, prompts, stop)
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    tokens = [row[: next((n for n, token in enumerate(row) if token in stop), len(row))] for row in tokens]
    print(json.dumps({"tokens": tokens, "prompts": [len(prompt) for prompt in prompts], **seconds}))


def by_loop(
    arguments: argparse.Namespace, loaded: Any, prompts: list[list[int]], stop: list[int]
) -> list[list[int]]:
    """Batches in file order, each as long as its longest answer."""
    import torch

    found: list[list[int]] = []
    for start in range(0, len(prompts), arguments.batch_size):
        batch = prompts[start : start + arguments.batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        made = loaded.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop[0],
        )
        found += made[:, width:].tolist()
    return found


def by_lorasmith(
    arguments: argparse.Namespace, loaded: Any, prompts: list[list[int]], stop: list[int]
) -> list[list[int]]:
    """The product's own path, its arithmetic included, in its own order."""
    import torch

    from lorasmith.followup.responses.engines import generation_route
    from lorasmith.models.device import use_route
    from lorasmith.models.generation.continuous import generate_continuously
    from lorasmith.models.generation.decoding import GenerationLimits, Request

    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    limits = GenerationLimits(arguments.max_new_tokens, frozenset(stop))
    found: dict[int, list[int]] = {}
    with use_route(generation_route("float32", torch.device("cpu"))):
        requests = (Request(index, prompts[index]) for index in order)
        for answer in generate_continuously(loaded, requests, limits, slots=arguments.batch_size):
            found[answer.index] = answer.tokens
    return [found[index] for index in range(len(prompts))]


def by_generate_batch(
    arguments: argparse.Namespace, loaded: Any, prompts: list[list[int]], stop: list[int]
) -> list[list[int]]:
    """transformers' own continuous batching, its cache held to what the rows under way need.

    Left alone it takes most of the memory that is free.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=stop[0]
    )
    longest = max(map(len, prompts)) + arguments.max_new_tokens
    cache = ContinuousBatchingConfig(
        num_blocks=arguments.batch_size * (longest // 256 + 1),
        max_requests_per_batch=arguments.batch_size,
        max_batch_tokens=2048,
    )
    found = loaded.model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=cache, progress_bar=False
    )
    return [found[f"req_{index}"].generated_tokens for index in range(len(prompts))]


def parent(arguments: argparse.Namespace) -> None:
    """Run the ways by turns and print the table."""
    ways = ["loop", "lorasmith", *(["generate_batch"] if arguments.reference else [])]
    best: dict[str, dict[str, Any]] = {}
    for _ in range(arguments.repeats):
        for way in ways:
            done = subprocess.run(
                [sys.executable, __file__, "--child", way, *sys.argv[1:]],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            if way not in best or found["processor"] < best[way]["processor"]:
                best[way] = found
    loop = best["loop"]
    lengths = sorted(len(row) for row in loop["tokens"])
    tenth, last = lengths[len(lengths) // 10], lengths[len(lengths) * 9 // 10]
    print(
        f"{len(lengths)} rows, answers of {lengths[0]} to {lengths[-1]} tokens "
        f"(10 % to 90 %: {tenth} to {last}), {arguments.batch_size} at once"
    )
    print("| way | rows/s (wall) | processor s | × rows/s, wall | × rows/s, processor | equal texts |")
    print("|---|---|---|---|---|---|")
    for way, found in best.items():
        equal = sum(one == other for one, other in zip(loop["tokens"], found["tokens"], strict=True))
        print(
            f"| {way} | {len(lengths) / found['wall']:.3f} | {found['processor']:.1f} | "
            f"{loop['wall'] / found['wall']:.2f} | {loop['processor'] / found['processor']:.2f} | "
            f"{equal}/{len(lengths)} |"
        )


if __name__ == "__main__":
    main()
