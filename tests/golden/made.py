"""What is pinned: each function makes one part in a folder and gives back what is comparable of it."""

from __future__ import annotations

import base64
import json
import re
import tarfile
import zlib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lorasmith
from lorasmith.cli.main import run as command
from tests.adapters.cases import CASES, Case
from tests.golden.comparable import comparable, digest, digest_value, record, table, words
from tests.golden.inputs import fixed_adapter, fixed_base
from tests.samples import sample_run
from tests.testset.invented import code_row, drop_row, gpqa_row, math_row, mmlu_row, write
from tests.tiny import tiny_rows

Made = dict[str, Any]
RECORD = "lorasmith_merge.json"
PRECISIONS = ("base", "float32", "bfloat16", "float16")


def call(*arguments: object) -> int:
    """The command line; returns its exit code."""
    return command([str(argument) for argument in arguments])


def one_of_each_variant() -> list[Case]:
    """The first case of each variant that the tests of adapters know."""
    return list({case.variant: case for case in reversed(CASES)}.values())[::-1]


def merged_folder(folder: Path, base: Path) -> Made:
    """Digests of the weights and of the record; what differs from the base in its other files."""
    files: Made = {}
    for path in sorted(folder.iterdir()):
        beside = base / path.name
        if path.name == RECORD:
            continue
        if path.suffix == ".safetensors":
            files[path.name] = digest(path.read_bytes())
        elif beside.is_file() and beside.read_bytes() == path.read_bytes():
            files[path.name] = "as in the base"
        elif path.name == "config.json":
            old, new = json.loads(beside.read_bytes()), json.loads(path.read_bytes())
            files[path.name] = {
                key: new.get(key, "<gone>")
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            }
        else:
            files[path.name] = words(path.read_text()).splitlines()
    return {"files": files, "record": digest_value(comparable(json.loads((folder / RECORD).read_bytes())))}


def variants(folder: Path) -> Made:
    """Every variant of adapter, rounded to nearest in the base's own type."""
    made: Made = {}
    for case in one_of_each_variant():
        base = folder / "bases" / case.architecture
        if not base.exists():
            fixed_base(base, case.architecture)
        adapter = fixed_adapter(folder / str(case) / "adapter", base, **case.config)
        output = folder / str(case) / "merged"
        lorasmith.merge(base, adapter, output, precision="base", rounding="nearest", seed=0)
        made[str(case)] = merged_folder(output, base)
    return made


def roundings(folder: Path) -> Made:
    """Roundings and types of bases and outputs; sums of several adapters; some with their proof."""
    made: Made = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        stored = str(dtype).removeprefix("torch.")
        base = fixed_base(folder / f"base-{stored}", dtype=dtype)
        plain = fixed_adapter(folder / f"plain-{stored}", base, use_rslora=True)
        second = fixed_adapter(folder / f"second-{stored}", base, seed="second", target_modules=["v_proj"])
        dora = fixed_adapter(folder / f"dora-{stored}", base, use_dora=True, target_modules=["q_proj"])
        for rounding, precision in product(("nearest", "dithered"), PRECISIONS):
            for name, adapters, weights in (("sum", [plain, second], [1.0, 0.625]), ("dora", [dora], [1.0])):
                output = folder / f"{name}-{stored}-{rounding}-{precision}"
                options: dict[str, Any] = {"precision": precision, "rounding": rounding, "seed": 7}
                lorasmith.merge(base, adapters, output, weights=weights, **options)
                made[output.name] = merged_folder(output, base)
                if stored == "bfloat16":
                    proof = lorasmith.prove(base, adapters, output, weights=weights)
                    told = comparable(json.loads(proof.to_json()))
                    made[output.name]["proof"] = digest_value(told)
    return made


def calibrated(folder: Path) -> Made:
    """A calibrated merge: what it is made of, told and proved, but not its bits (see the package)."""
    base = fixed_base(folder / "base")
    adapter = fixed_adapter(folder / "adapter", base)
    train = write(folder / "train.jsonl", tiny_rows(24, seed=5))
    test_set = write(folder / "test.jsonl", tiny_rows(12))
    output = folder / "merged"
    lorasmith.merge(
        base, adapter, output, precision="base", rounding="calibrated", seed=7, calibration=train,
        calibration_tokens=400, test_set=test_set, template="auto", device="cpu",
    )  # fmt: skip
    shards = {path.name: load_file(path) for path in sorted(output.glob("*.safetensors"))}
    proof = lorasmith.prove(base, adapter, output)
    return {
        "files": sorted(path.name for path in output.iterdir()),
        "tensors": {
            name: {
                key: [str(tensor.dtype), list(tensor.shape), float(f"{tensor.double().norm():.4g}")]
                for key, tensor in shard.items()
            }
            for name, shard in shards.items()
        },
        "record": record(output / RECORD, decided=False),
        "proof": comparable(json.loads(proof.to_json()), decided=False),
    }


def whole_run(folder: Path) -> Made:
    """Every file of a tiny run but its times and what is made of other files: seals, archives, the page."""
    base = fixed_base(folder / "base")
    adapter = fixed_adapter(folder / "adapter", base)
    config = folder / "run.toml"
    config.write_text(CONFIG)
    command_line = [
        "run", "--config", config, "--base", base, "--adapter", adapter, "--output", folder / "run",
        "--test-set", write(folder / "test.jsonl", tiny_rows(12)),
        "--train", write(folder / "train.jsonl", tiny_rows(12, seed=5)),
    ]  # fmt: skip
    made: Made = {"exit code": call(*command_line)}
    made["merged"] = merged_folder(folder / "run" / "merged", base)
    for path in sorted((folder / "run").rglob("*")):
        name = path.relative_to(folder / "run").as_posix()
        if path.is_dir() or path.name == ".lock" or path.parent.name == "merged":
            continue
        if name in ("timing.json", "report.html") or path.suffix == ".tar":
            made[name] = "there"
        elif path.suffix == ".json":
            exact = path.parent.name == "testset" or name == "proof/weights.json"
            made[name] = record(path, decided=exact)
        elif path.suffix == ".parquet":
            made[name] = table(path)
        elif path.suffix == ".jsonl":
            made[name] = digest(path.read_bytes())
        else:
            made[name] = digest(words(path.read_text()))
    return made


CONFIG = """
precision = "base"
rounding = "nearest"
calibration_tokens = 400
seed = 7
template = "auto"
loss_on = "response"
end_of_turn = true
device = "cpu"
arithmetic = "auto"
batch_tokens = 512
max_length = 200
strict = true
tasks = false
generate = 4
compression = "none"
"""


def release(folder: Path) -> Made:
    """The page and the package of a run made of fixed records alone."""
    run = sample_run(folder / "run")
    made: Made = {"exit code of report": call("report", run, "--output", folder / "page.html", "--timings")}
    made["page"] = page(folder / "page.html")
    call("report", run, "--output", folder / "without.html", "--no-timings")
    made["page without times"] = page(folder / "without.html")
    package = folder / "package"
    made["exit code of package"] = call("package", run, "--output", package, "--compression", "none")
    made["files"] = sorted(path.name for path in package.iterdir())
    made["archives"] = {path.name: members(path) for path in sorted(package.glob("*.tar"))}
    model = package / "merged_model.tar"
    made["stream of the model"] = digest(model.read_bytes())
    made["SHA256SUMS"] = words((package / "SHA256SUMS").read_text())
    made["model in SHA256SUMS"] = digest(model.read_bytes()) in (package / "SHA256SUMS").read_text()
    for name in ("manifest.json", "bom.cdx.json"):
        made[name] = record(package / name)
    made["exit code of verify"] = call("verify", package)
    return made


def page(path: Path) -> Made:
    """Digests of a page's parts; its compressed parts unpacked, as zlib's bytes depend on its version."""

    def unpacked(match: re.Match[str]) -> str:
        return match[1] + zlib.decompress(base64.b64decode(match[2]), -zlib.MAX_WBITS).decode()

    text = re.sub(r'(class="chunk"[^>]*>)([^<]+)', unpacked, path.read_text())
    parts = re.split(r"(?=<section\b|<script\b|<style\b|<main\b|<footer\b)", text)
    return {f"{number} {part[:60].splitlines()[0]}": digest(part) for number, part in enumerate(parts)}


def members(archive: Path) -> Made:
    """Name, kind, mode, owner and time of each member in order, and its content."""
    made: Made = {}
    with tarfile.open(archive) as tar:
        for number, info in enumerate(tar):
            content = tar.extractfile(info)
            assert content is not None
            data = content.read()
            # The tables hold the version of the library that wrote them, the page compressed parts.
            kept = "<other>" if info.name.endswith((".parquet", ".html")) else digest(data)
            head = [
                info.type.decode(),
                oct(info.mode),
                info.uid,
                info.gid,
                info.uname,
                info.gname,
                info.mtime,
            ]
            made[f"{number} {info.name}"] = [*map(str, head), kept]
    return made


def test_sets(folder: Path) -> Made:
    """Built and split test sets, byte for byte, and their records."""
    makers = {"math": math_row, "mmlu": mmlu_row, "humaneval": code_row, "gpqa": gpqa_row, "drop": drop_row}
    for name, make in makers.items():
        write(folder / "benchmarks" / f"{name}.jsonl", [make(number) for number in range(40)])
    made: Made = {}
    for policy in ("guide", "native"):
        output = folder / policy / "test.jsonl"
        made[f"exit code of build, {policy}"] = call(
            "testset", "build", "--benchmarks", folder / "benchmarks", "--output", output, "--seed", 7,
            "--samples-per-benchmark", 12, "--samples", "MATH=20", "--difficulty", policy, "--strict",
        )  # fmt: skip
        made |= folder_of(output.parent)
    rows = [
        {
            "prompt": f"question {n}",
            "response": f"answer {n}",
            "difficulty": "ehm"[n % 3],
            "domain": "xy"[n % 2],
        }
        for n in range(60)
    ]
    for name, flags in (("copied", []), ("removed", ["--remove", "--backup"])):
        train = write(folder / name / "train.jsonl", rows)
        output = folder / name / "test.jsonl"
        options = ["--size", 12, "--stratify-by", "difficulty,domain", "--seed", 7]
        made[f"exit code of split, {name}"] = call(
            "testset", "split", "--train", train, "--output", output, *options, *flags
        )
        made[f"exit code of check, {name}"] = call(
            "testset",
            "check",
            "--test-set",
            output,
            "--train",
            train,
            "--output",
            folder / name / "check.json",
        )
        made |= folder_of(output.parent)
    return made


def folder_of(folder: Path) -> Made:
    """The files of a folder: rows by digest, records by value."""
    made: Made = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            key = f"{folder.name}/{path.name}"
            made[key] = record(path) if path.suffix == ".json" else digest(path.read_bytes())
    return made


PARTS: dict[str, Callable[[Path], Made]] = {
    "variants": variants,
    "roundings": roundings,
    "calibrated": calibrated,
    "whole run": whole_run,
    "release": release,
    "test sets": test_sets,
}
"""Name in `expected.json` → what makes it."""
