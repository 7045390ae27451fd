"""Merge speed and memory beside copying, PEFT and mergekit, on a random model of a given size.

    python benches/merge.py --parameters 3.2e9 --repeats 5
    python benches/merge.py --parameters 5e8,1e9,3e9,7e9 --tools lorasmith --repeats 1
    python benches/merge.py --tools lorasmith,mergekit --mergekit-python ENVIRONMENT/bin/python

Every tool starts from a cold source (POSIX_FADV_DONTNEED) and is done when its output is synced. The tools
take turns, so that a noisy moment hits all of them; the table shows medians. `lorasmith` hashes
what it writes, `lorasmith+base` what it reads as well, as for a base that it has not seen before; `prove`
proves a merge that `lorasmith` has just made, base and merge both cold, and `dd read` only reads as much past
the page cache, which is what the disk leaves a proof. All that is written is removed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorasmith.checkpoint.header import build_header, nbytes_of

SHARD_BYTES = 5_000_000_000
TOOLS = ("lorasmith", "prove", "dd read", "lorasmith+base", "cp -r", "dd direct", "peft", "mergekit")

REFERENCES = ("cp -r", "dd direct", "dd read", "lorasmith")
"""What the seconds of every tool are set against."""


def layout(parameters: float) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...]]]]:
    """A Llama config and its tensors with about this many parameters."""
    vocabulary = 32_000
    layers = 16 if parameters < 2e9 else 28
    # Per layer 4·h² of attention and 3·h·3h of the MLP, plus embedding and head.
    hidden = 128
    while layers * 13 * hidden**2 + 2 * vocabulary * hidden < parameters:
        hidden += 128
    inner = 3 * hidden
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors += [(f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo"]
        tensors += [(f"{prefix}.mlp.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up")]
        tensors += [(f"{prefix}.mlp.down_proj.weight", (hidden, inner))]
        tensors += [(f"{prefix}.{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention")]
    tensors += [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]
    return config, tensors


def write_tensors(path: Path, tensors: list[tuple[str, tuple[int, ...]]], noise: torch.Tensor) -> None:
    """A safetensors file of random bfloat16 numbers: one block of noise over and over, at odd offsets."""
    header, _ = build_header(((name, "BF16", shape) for name, shape in tensors), {"format": "pt"})
    raw = noise.view(torch.uint8).numpy().data
    with path.open("wb") as file:
        file.write(header)
        for number, (_, shape) in enumerate(tensors):
            left = nbytes_of("BF16", shape)
            start = number * 7919 * 2 % (len(raw) // 2)
            while left:
                part = min(left, len(raw) - start)
                file.write(raw[start : start + part])
                left, start = left - part, 0
        file.flush()
        os.fsync(file.fileno())


def make_inputs(folder: Path, parameters: float, rank: int) -> tuple[Path, Path, float]:
    """Base and adapter folders, and the true number of parameters."""
    config, tensors = layout(parameters)
    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in tensors:
        size = sum(nbytes_of("BF16", known) for _, known in shards[-1])
        if size + nbytes_of("BF16", shape) > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, shape))
    weight_map = {}
    for number, part in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(base / file, part, noise)
        weight_map |= {name: file for name, _ in part}
    total = sum(nbytes_of("BF16", shape) for _, shape in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps(config))
    factors = []
    targets = [(name, shape) for name, shape in tensors if "_proj" in name]
    for name, (rows, columns) in targets:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors += [(f"{module}.lora_A.weight", (rank, columns)), (f"{module}.lora_B.weight", (rows, rank))]
    write_tensors(adapter / "adapter_model.safetensors", factors, noise)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
        "base_model_name_or_path": str(base),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return base, adapter, total / 2


def cool(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(folder: Path) -> None:
    """What a copy needs in order to be as safe as a merge: every file on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


CHILD = """
import json, sys, time
from pathlib import Path
import torch
from lorasmith.machine.resources import peak_memory
idle = peak_memory()
{body}
print(json.dumps({{"seconds": seconds, "memory": peak_memory() - idle}}))
"""

LORASMITH = """
from lorasmith.merging.merge import merge
begin = time.monotonic()
record = merge(Path({base!r}), Path({adapter!r}), Path({out!r}))
seconds = time.monotonic() - begin
print("direct I/O:", record.direct_io, file=sys.stderr)
"""

PROVE = """
from lorasmith.proving.weights.prove import prove
begin = time.monotonic()
record = prove(Path({base!r}), Path({adapter!r}), Path({out!r}))
seconds = time.monotonic() - begin
assert record.grade == "exact", record.grade
"""

PEFT = """
import os
from peft import PeftModel
from transformers import AutoModelForCausalLM
begin = time.monotonic()
model = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload()
merged.save_pretrained({out!r}, max_shard_size="5GB")
for file in Path({out!r}).iterdir():
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
seconds = time.monotonic() - begin
"""


def run_child(
    body: str, base: Path, adapter: Path, out: Path, environment: dict[str, str]
) -> dict[str, float]:
    """One run in its own process: seconds of the work, and peak memory above an interpreter with torch."""
    script = CHILD.format(body=body.format(base=str(base), adapter=str(adapter), out=str(out)))
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of something that runs outside Python."""
    begin = time.monotonic()
    work()
    return {"seconds": time.monotonic() - begin}


def dd(source: Path, target: Path, *operands: str) -> None:
    """Copy a file, read past the page cache."""
    command = ["dd", f"if={source}", f"of={target}", "bs=32M", "iflag=direct", *operands]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def run(
    tool: str, base: Path, adapter: Path, out: Path, caches: Path, interpreter: str | None
) -> dict[str, float]:
    """Run one tool once, from a cold source to a synced output."""
    warm = {"LORASMITH_CACHE": str(caches)}
    if tool == "lorasmith":
        return run_child(LORASMITH, base, adapter, out, warm)
    if tool == "lorasmith+base":
        with tempfile.TemporaryDirectory() as empty:
            return run_child(LORASMITH, base, adapter, out, {"LORASMITH_CACHE": empty})
    if tool == "prove":
        run_child(LORASMITH, base, adapter, out, warm)
        cool(base)
        cool(out)
        return run_child(PROVE, base, adapter, out, warm)
    if tool == "peft":
        return run_child(PEFT, base, adapter, out, {})
    if tool == "cp -r":

        def copy() -> None:
            subprocess.run(["cp", "-r", str(base), str(out)], check=True)
            sync(out)

        return timed(copy)
    if tool == "dd direct":

        def direct() -> None:
            out.mkdir()
            for file in base.glob("*.safetensors"):
                dd(file, out / file.name, "oflag=direct", "conv=fsync")

        return timed(direct)
    if tool == "dd read":

        def read() -> None:
            for file in [*base.glob("*.safetensors")] * 2:
                dd(file, Path(os.devnull))

        return timed(read)
    recipe = out.with_suffix(".yml")
    model = f"{base}+{adapter}"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: '{model}'}}]\ndtype: bfloat16\n")

    def mergekit() -> None:
        cache = out.with_suffix(".cache")
        command = [*mergekit_command(interpreter), str(recipe), str(out), "--lora-merge-cache", str(cache)]
        subprocess.run(command, check=True, capture_output=True)
        sync(out)
        shutil.rmtree(cache, ignore_errors=True)

    return timed(mergekit)


def mergekit_command(interpreter: str | None) -> list[str]:
    """mergekit in its own environment, or the command on the path."""
    return [interpreter, "-m", "mergekit.scripts.run_yaml"] if interpreter else ["mergekit-yaml"]


def available(tool: str, interpreter: str | None) -> bool:
    """Whether a tool is installed."""
    if tool == "mergekit":
        return interpreter is not None or shutil.which("mergekit-yaml") is not None
    return tool != "peft" or importlib.util.find_spec("peft") is not None


def bench(
    parameters: float, tools: list[str], repeats: int, rank: int, work: Path, interpreter: str | None
) -> None:
    """Time the tools in turn and print one line each."""
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="merge-bench-", dir=work))
    try:
        base, adapter, count = make_inputs(folder, parameters, rank)
        size = sum(file.stat().st_size for file in base.iterdir())
        print(f"\n{count / 1e9:.2f} B parameters, {size / 1e9:.2f} GB, rank {rank}, {repeats} runs each")
        results: dict[str, list[dict[str, float]]] = {tool: [] for tool in tools}
        out, caches = folder / "out", folder / "caches"
        if "lorasmith" in tools:
            # Once before the clock runs, so that the digests of the base are known.
            run("lorasmith", base, adapter, out, caches, interpreter)
            shutil.rmtree(out)
        for _ in range(repeats):
            for tool in tools:
                cool(base)
                results[tool].append(run(tool, base, adapter, out, caches, interpreter))
                if out.exists():
                    shutil.rmtree(out)
        reference = {
            name: statistics.median(run["seconds"] for run in results[name])
            for name in REFERENCES
            if results.get(name)
        }
        heads = "".join(f"{'/ ' + name:>13}" for name in REFERENCES)
        print(f"{'tool':<16}{'seconds':>9}{'range':>14}{'GB/s':>7}{heads}{'memory':>10}")
        for tool, runs in results.items():
            seconds = [run["seconds"] for run in runs]
            middle = statistics.median(seconds)
            ratios = "".join(
                f"{middle / reference[name]:>13.2f}" if name in reference else " " * 13 for name in REFERENCES
            )
            memory = max((run["memory"] for run in runs if "memory" in run), default=None)
            shown = f"{memory / 1e6:>7.0f} MB" if memory is not None else ""
            spread = f"{min(seconds):.1f}–{max(seconds):.1f}"
            print(
                f"{tool:<16}{middle:>9.2f}{spread:>14}{size / middle / 1e9:>7.2f}{ratios}{shown}", flush=True
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", default="5e8", help="how many, or several sizes with commas")
    parser.add_argument("--tools", default=",".join(TOOLS), help="which of " + ", ".join(TOOLS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure"
    )
    parser.add_argument("--mergekit-python", help="the interpreter of an environment that has mergekit")
    arguments = parser.parse_args()
    interpreter = arguments.mergekit_python
    tools = []
    for tool in arguments.tools.split(","):
        if available(tool, interpreter):
            tools.append(tool)
        else:
            print(f"{tool} is not installed and left out", file=sys.stderr)
    for parameters in arguments.parameters.split(","):
        bench(float(parameters), tools, arguments.repeats, arguments.rank, arguments.work, interpreter)


if __name__ == "__main__":
    main()
